"""Where serveit meets Ray: what places, starts, watches and replaces processes. No request passes here.

The only room that imports ray. Comes with the Ray runtime.
"""
