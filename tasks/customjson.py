"""The older name of tasks/jsonl_chat.py."""
from tasks.common import register
from tasks.jsonl_chat import JsonlChat


@register("CustomJSON")
class CustomJSON(JsonlChat):
    """JsonlChat, for recipes that know it by this name."""
