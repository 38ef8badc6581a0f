from serveit import App

app = App()


@app.route("/hello/<name>")
async def hello(name: str, shout: bool = False) -> str:
    greeting = f"Hello, {name}!"
    return greeting.upper() if shout else greeting
