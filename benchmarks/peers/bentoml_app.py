"""The echo on BentoML: `bentoml serve bentoml_app:Echo`. Its body names the arguments of `echo`."""

import bentoml


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Echo:
    @bentoml.api
    async def echo(self, x: list) -> dict:
        return {"x": x}
