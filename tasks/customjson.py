"""The older name of tasks/jsonl_chat.py."""
from tasks.common import register
from tasks.jsonl_chat import JsonlChat

CustomJSON = register("CustomJSON")(type("CustomJSON", (JsonlChat,), {"__module__": __name__, "__doc__": JsonlChat.__doc__}))
