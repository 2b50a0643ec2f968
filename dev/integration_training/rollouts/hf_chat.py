"""A Hugging Face tokenizer with a chat template as the tokenizer that this project's loops ask: conversations to ids and a mask."""
from tasks.common import message_text


class ChatTokenizer:
    """`truncated` and `untrained` count as in nanochat.tokenizer. Pieces are encoded one by one, so that a prompt has the ids here that it has when
    the model answers it, and what is trained begins where sampling begins."""

    def __init__(self, tokenizer):
        if tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template, so a conversation has no form: use an Instruct model, or put a chat_template.jinja beside it")
        if tokenizer.eos_token_id is None:
            raise ValueError("the model's tokenizer names no eos_token, so an answer has no end: name one in its tokenizer_config.json")
        self.tokenizer, self.eos_id = tokenizer, tokenizer.eos_token_id
        self.bos_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id  # what pads
        self.truncated = self.untrained = 0

    def text(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def render_prompt(self, messages):
        return self.encode(self.text(plain(messages), add_generation_prompt=True))

    def render_for_completion(self, conversation):
        return self.render_prompt(conversation["messages"][:-1])

    def render_conversation(self, conversation, max_tokens):
        """-> (ids, mask): 1 on what the assistant says and on the token that ends it. Too long, it loses its end."""
        messages, ids, mask, done = plain(conversation["messages"]), [], [], ""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self.text(messages)
        prompts = [self.text(messages[:place], add_generation_prompt=True) for place in answers]
        upto = [self.text(messages[:place + 1]) for place in answers]
        if not all(whole.startswith(text) for text in prompts + upto):
            # a template that shows earlier turns in another form than when they were said: what is sampled is the last one alone
            answers, prompts, upto = answers[-1:], prompts[-1:], [whole]
        for place, prompt, text in zip(answers, prompts, upto):
            asked = self.encode(prompt[len(done):])
            said = self.encode(text[len(prompt):]) if text.startswith(prompt) else self.encode(messages[place]["content"]) + [self.eos_id]
            end = len(said) - said[::-1].index(self.eos_id) if self.eos_id in said else len(said)  # a template may put a line break behind the end
            ids += asked + said
            mask += [0] * len(asked) + [1] * end + [0] * (len(said) - end)
            done = text
        self.truncated += len(ids) > max_tokens
        ids, mask = ids[:max_tokens], mask[:max_tokens]
        self.untrained += not any(mask)
        return ids, mask


def plain(messages):
    """Messages with text contents: a calculator's calls and outputs are left out, for this model has no such tokens."""
    return [{"role": message["role"], "content": words(message)} for message in messages]


def words(message):
    if isinstance(message["content"], str):
        return message_text(message)
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
