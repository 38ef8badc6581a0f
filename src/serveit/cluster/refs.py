"""ObjectRefs: the actor task behind `handle.remote`, and arguments that are waited for before it."""
