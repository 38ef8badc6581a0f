"""Where HTTP comes in: uvicorn around, and what turns a request into a call on a route's backend."""
