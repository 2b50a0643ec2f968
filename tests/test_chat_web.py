"""The server as clients see it: OpenAI's own client, raw HTTP, the command line."""
import concurrent.futures
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch

from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine, Request, message_parts
from nanochat.serving.app import Settings
from nanochat.serving.pool import Pool
from nanochat.serving.text import token_text
from nanochat.tokenizer import SPECIAL_TOKENS, get_tokenizer
from scripts import chat_web
from tests.serving import SECONDS, SPECIAL, Pace, get, make_base, said, serve, wait_until_idle, written

QUESTION = [{"role": "user", "content": "How many cups in all?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for name in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR", "NANOCHAT_API_KEY"):
            patch.delenv(name, raising=False)
        make_base(folder)
        yield folder


@pytest.fixture(scope="module")
def server(folder):
    with serve(routers=(chat_web.router,)) as server:
        yield server
        wait_until_idle(server)


@pytest.fixture(scope="module")
def engine(folder):
    """The model that the server serves, asked directly."""
    model, tokenizer, _ = load_model("rl", "cpu", dtype="float32")
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:
        yield client


def post(server, path, body, **headers):
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return httpx.post(server.url + path, content=content, headers={"content-type": "application/json", **headers}, timeout=SECONDS)


def alone(engine, prompt, **settings):
    """The completions that the engine gives to a prompt when nobody else is there."""
    return engine.generate([Request(prompt, **{"max_new_tokens": 20, "temperature": 0.0, **settings})])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Chat

def test_the_openai_client_gets_what_the_engine_says(client, engine):
    (expected,) = alone(engine, engine.tokenizer.render_prompt(QUESTION))
    whole = client.chat.completions.create(model="rl", messages=QUESTION, temperature=0, max_tokens=20)
    assert whole.choices[0].message.content == said(expected) and whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage.completion_tokens == len(expected.tokens) and whole.usage.prompt_tokens == len(engine.tokenizer.render_prompt(QUESTION))
    chunks = list(client.chat.completions.create(model="rl/d2", messages=QUESTION, temperature=0, max_completion_tokens=20, stream=True,
                                                 stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said(expected)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_samples_are_those_of_the_seed(client, engine):
    expected = alone(engine, engine.tokenizer.render_prompt(QUESTION), num_samples=3, temperature=0.9, top_k=40, top_p=0.95, seed=7)
    settings = {"model": "rl/d2/5", "messages": QUESTION, "n": 3, "temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 20, "extra_body": {"top_k": 40}}
    whole = client.chat.completions.create(**settings)
    assert [choice.message.content for choice in whole.choices] == list(map(said, expected))
    texts, finishes = ["", "", ""], {}
    for chunk in client.chat.completions.create(**settings, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        if chunk.choices[0].finish_reason:
            finishes[chunk.choices[0].index] = chunk.choices[0].finish_reason
    assert texts == list(map(said, expected)) and finishes == {i: one.finish_reason for i, one in enumerate(expected)}
    assert len({choice.message.content for choice in client.chat.completions.create(model="rl", messages=QUESTION, n=8, temperature=2).choices}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_never_seen(client, engine, stream):
    (expected,) = alone(engine, engine.tokenizer.render_prompt(QUESTION), max_new_tokens=40)
    for length in (1, 2, 5):
        stop = said(expected)[8:8 + length]
        cut = said(expected)[:said(expected).index(stop)]
        for given in (stop, ["never there", stop]):
            answer = client.chat.completions.create(model="rl", messages=QUESTION, temperature=0, max_tokens=40, stop=given, stream=stream)
            if stream:
                chunks = list(answer)
                text, finish = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason
            else:
                text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert (text, finish) == (cut, "stop")


def test_logprobs_are_the_models_own_whole_and_streamed(client, engine):
    prompt = engine.tokenizer.render_prompt(QUESTION)
    (expected,) = alone(engine, prompt, temperature=1.5, seed=3)
    with torch.no_grad():
        logprobs = torch.log_softmax(engine.model(torch.tensor([prompt + expected.tokens]))[0, len(prompt) - 1:-1], dim=-1)
    settings = {"model": "rl", "messages": QUESTION, "temperature": 1.5, "seed": 3, "max_tokens": 20, "logprobs": True, "top_logprobs": 3, "extra_body": {"top_k": 0}}
    whole = client.chat.completions.create(**settings).choices[0].logprobs.content
    streamed = [entry for chunk in client.chat.completions.create(**settings, stream=True) if chunk.choices[0].logprobs
                for entry in chunk.choices[0].logprobs.content]
    for entries in (whole, streamed):
        assert [entry.token for entry in entries] == [token_text(engine.tokenizer, token) for token in expected.tokens]
        assert [entry.logprob for entry in entries] == pytest.approx(logprobs.gather(1, torch.tensor(expected.tokens)[:, None])[:, 0].tolist(), abs=1e-4)
        assert [top.logprob for top in entries[2].top_logprobs] == pytest.approx(logprobs[2].topk(3).values.tolist(), abs=1e-4)
        assert all(bytes(entry.bytes) == engine.tokenizer.id_to_bytes(token) for entry, token in zip(entries, expected.tokens))


def test_a_conversation_goes_on_with_its_tool_calls(server, engine):
    parts = [{"type": "text", "text": "so "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    messages = [{"role": "developer", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": parts, "refusal": None},
                {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
    reply = post(server, "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 6}).json()
    as_ours = [{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": parts}, {"role": "user", "content": "and?"}]
    prompt = engine.tokenizer.render_prompt(as_ours)
    assert reply["usage"]["prompt_tokens"] == len(prompt) and reply["choices"][0]["message"]["content"] == said(alone(engine, prompt, max_new_tokens=6)[0])


def test_an_answer_with_a_tool_call_has_its_parts(server, engine):
    """Random models call tools now and then: one of many samples does."""
    prompt, settings = engine.tokenizer.render_prompt(QUESTION), {"temperature": 2.0, "max_new_tokens": 60}
    for seed in range(20):
        completions = alone(engine, prompt, num_samples=64, seed=seed, **settings)
        parts = [message_parts(engine.tokenizer, completion.tokens) for completion in completions]
        calls = [i for i, each in enumerate(parts) if any(part["type"] == "python" for part in each)]
        if calls:
            break
    assert calls, "no sample calls a tool"
    body = {"messages": QUESTION, "temperature": 2, "seed": seed, "max_tokens": 60, "top_k": 0, "n": calls[0] + 1}
    message = post(server, "/v1/chat/completions", body).json()["choices"][calls[0]]["message"]
    assert message["parts"] == parts[calls[0]] and message["content"] == said(completions[calls[0]])
    assert not re.search(SPECIAL, message["content"])
    raw = post(server, "/v1/chat/completions", {**body, "skip_special_tokens": False}).json()["choices"][calls[0]]["message"]
    assert raw["content"] == completions[calls[0]].text and "<|python_start|>" in raw["content"]
    scored = post(server, "/v1/chat/completions", {**body, "logprobs": True}).json()["choices"][calls[0]]
    assert [entry["token"] for entry in scored["logprobs"]["content"]] == [token_text(engine.tokenizer, token) for token in completions[calls[0]].tokens]
    events = post(server, "/v1/chat/completions", {**body, "stream": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(event[6:])["choices"][0] for event in events[:-2]]
    assert [choice["delta"]["parts"] for choice in choices if choice["index"] == calls[0] and choice["finish_reason"]] == [parts[calls[0]]]
    assert "".join(choice["delta"].get("content", "") for choice in choices if choice["index"] == calls[0]) == message["content"]


# ---------------------------------------------------------------------------------------------------------------------
# Completions

def test_prompts_may_be_text_or_ids_one_or_many(client, engine):
    texts = ["Ann has", "10*8="]
    ids = [engine.tokenizer.encode(text, prepend="<|bos|>") for text in texts]
    expected = [written(engine.tokenizer, alone(engine, prompt, max_new_tokens=9)[0]) for prompt in ids]
    for prompt, wanted in ((texts[0], expected[:1]), (texts, expected), (ids[0], expected[:1]), (ids, expected)):
        reply = client.completions.create(model="rl", prompt=prompt, temperature=0, max_tokens=9)
        assert [choice.text for choice in reply.choices] == wanted and [choice.index for choice in reply.choices] == list(range(len(wanted)))
        echoed = client.completions.create(model="rl", prompt=prompt, temperature=0, max_tokens=9, echo=True)
        names = texts if prompt in (texts, texts[0]) else ["<|bos|>" + text for text in texts]
        assert [choice.text for choice in echoed.choices] == [name + text for name, text in zip(names, wanted)]
        streamed = [""] * len(wanted)
        for chunk in client.completions.create(model="rl", prompt=prompt, temperature=0, max_tokens=9, echo=True, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [choice.text for choice in echoed.choices]
    reply = client.completions.create(model="rl", prompt=texts, temperature=1, seed=1, n=2, max_tokens=9)
    assert len(reply.choices) == 4 and reply.usage.prompt_tokens == sum(map(len, ids))


@pytest.mark.parametrize("settings", [{"max_tokens": 1, "temperature": 0}, {"max_tokens": 0}, {"max_tokens": 5, "temperature": 0},
                                      {"max_tokens": 1, "temperature": 0, "stream": True}, {"max_tokens": 5, "temperature": 0, "stream": True}])
def test_echoed_prompts_are_scored_token_by_token(server, engine, settings):
    prompts = [engine.tokenizer.encode("Ann has 10 boxes, naïve 東"), [5, 6, 7], [engine.tokenizer.bos_id]]
    body = {"model": "rl", "prompt": prompts, "echo": True, "logprobs": 2, "seed": 1, **settings}
    answer = post(server, "/v1/completions", body)
    if settings.get("stream"):
        found = {}
        for event in answer.text.split("\n\n")[:-2]:
            choice = json.loads(event[6:])["choices"][0]
            merged = found.setdefault(choice["index"], {"text": "", "logprobs": {}})
            merged["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                merged["logprobs"][name] = merged["logprobs"].get(name, []) + values
        choices = [found[i] for i in range(3)]
    else:
        choices = answer.json()["choices"]
    for prompt, choice in zip(prompts, choices):
        generated = alone(engine, prompt, max_new_tokens=settings["max_tokens"])[0] if settings["max_tokens"] else None
        tokens = prompt + (generated.tokens if generated else [])
        with torch.no_grad():
            expected = torch.log_softmax(engine.model(torch.tensor([tokens]))[0], dim=-1)
        said = choice["logprobs"]
        assert said["tokens"] == [token_text(engine.tokenizer, token) for token in tokens]
        assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
        assert said["token_logprobs"][1:] == pytest.approx([expected[t - 1, tokens[t]].item() for t in range(1, len(tokens))], abs=1e-4)
        for t in range(1, len(tokens)):
            assert (max(said["top_logprobs"][t].values()) == said["token_logprobs"][t]) == (expected[t - 1].argmax().item() == tokens[t])
        assert choice["text"] == engine.tokenizer.decode(prompt) + (written(engine.tokenizer, generated) if generated else "")
        for token, offset, text in zip(tokens, said["text_offset"], said["tokens"]):
            if not text.startswith("bytes:") and text not in SPECIAL_TOKENS:
                assert choice["text"][offset:offset + len(text)] == text


def test_the_echoed_text_of_a_prompt_with_an_added_bos_keeps_its_offsets(server):
    choice = post(server, "/v1/completions", {"prompt": "Ann has", "echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0}).json()["choices"][0]
    said = choice["logprobs"]
    assert said["tokens"][0] == "<|bos|>" and said["text_offset"][:2] == [0, 0] and choice["text"].startswith("Ann has")
    for offset, text in list(zip(said["text_offset"], said["tokens"]))[1:-1]:
        assert choice["text"][offset:offset + len(text)] == text


def test_a_prompt_may_fill_the_whole_context_where_it_is_only_scored(server):
    body = {"prompt": [[5] * 96], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    assert len(post(server, "/v1/completions", body).json()["choices"][0]["logprobs"]["tokens"]) == 97
    error = post(server, "/v1/completions", {**body, "prompt": [[5] * 97]})
    assert error.status_code == 400 and error.json()["error"]["code"] == "context_length_exceeded" and "97" in error.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and how

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize("path, body, status, param", [
    (CHAT, {"messages": QUESTION, "model": "rl/none"}, 404, "model"), (CHAT, {"messages": QUESTION, "model": "../x"}, 404, "model"),
    (CHAT, {"messages": QUESTION, "model": "rl/../d2"}, 404, "model"), (CHAT, {"messages": QUESTION, "model": "rl/d2/99"}, 404, "model"),
    (CHAT, {"messages": QUESTION, "model": "rl/d2/²"}, 404, "model"), (CHAT, {"messages": QUESTION, "model": "rl\0"}, 404, "model"),
    (CHAT, {}, 400, "messages"), (CHAT, {"messages": []}, 400, "messages"), (CHAT, {"messages": "x"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, 400, None), (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, None),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, 400, None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, None),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "messages"),
    (CHAT, {"messages": QUESTION, "temperature": -1}, 400, "temperature"), (CHAT, {"messages": QUESTION, "temperature": "1"}, 400, "temperature"),
    (CHAT, {"messages": QUESTION, "temperature": True}, 400, "temperature"), (CHAT, {"messages": QUESTION, "n": 0}, 400, "n"),
    (CHAT, {"messages": QUESTION, "n": 1.5}, 400, "n"), (CHAT, {"messages": QUESTION, "n": 10**30}, 400, "n"), (CHAT, {"messages": QUESTION, "top_p": 1.1}, 400, "top_p"),
    (CHAT, {"messages": QUESTION, "max_tokens": 0}, 400, "max_tokens"), (CHAT, {"messages": QUESTION, "seed": 2**70}, 400, "seed"),
    (CHAT, {"messages": QUESTION, "stop": [""] * 33}, 400, None), (CHAT, {"messages": QUESTION, "stop": "x" * 257}, 400, None),
    (CHAT, {"messages": QUESTION, "top_logprobs": 2}, 400, "top_logprobs"), (CHAT, {"messages": QUESTION, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"messages": QUESTION, "frequency_penalty": 0.5}, 400, "frequency_penalty"), (CHAT, {"messages": QUESTION, "tools": [{"x": 1}]}, 400, "tools"),
    (CHAT, {"messages": QUESTION, "response_format": {"type": "json_object"}}, 400, "response_format"), (CHAT, {"messages": QUESTION, "tempratur": 1}, 400, "tempratur"),
    (TEXT, {"prompt": []}, 400, "prompt"), (TEXT, {"prompt": [[]]}, 400, "prompt"), (TEXT, {"prompt": [[400]]}, 400, None), (TEXT, {"prompt": [[-1]]}, 400, None),
    (TEXT, {"prompt": [["a"]]}, 400, None), (TEXT, {"prompt": [1, "a"]}, 400, None), (TEXT, {"prompt": None}, 400, None), (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    (TEXT, {"prompt": [[400]], "echo": True, "logprobs": 1, "max_tokens": 0}, 400, "prompt"), (TEXT, {"prompt": "x", "best_of": 3}, 400, "best_of"),
    (TEXT, {"prompt": "x", "logprobs": 21}, 400, "logprobs"), (TEXT, {"prompt": "x", "logprobs": True}, 400, "logprobs"), (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    (TEXT, {"prompt": ["x"] * 400}, 400, None), (TEXT, {"prompt": "word " * 300}, 400, "prompt"),
    (CHAT, b"{", 400, None), (CHAT, b"", 400, None), (CHAT, b"[" * 100_000, 400, None), (CHAT, b"\xff\xfe", 400, None), (CHAT, b"null", 400, None),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, None), (CHAT, b'{"n": 1' + b"0" * 5000 + b"}", 400, None),
    ("/render", {"text": "x" * 20_001}, 400, "text"), ("/tokenize", {}, 400, "prompt"), ("/detokenize", {"tokens": [400]}, 400, None),
    ("/aqua/letters", {"messages": QUESTION, "letters": ["A"]}, 400, "letters"), ("/aqua/letters", {"messages": QUESTION, "letters": ["q q", "B"]}, 400, None),
    ("/aqua/letters", {"messages": QUESTION, "text": "x " * 200}, 400, None), ("/aqua/attention", {"messages": QUESTION, "layer": 2}, 400, "layer"),
    ("/aqua/attention", {"messages": QUESTION, "head": 2}, 400, "head"), ("/nothing", {}, 404, None), ("/health", {}, 405, None)])
def test_a_wrong_request_is_told_what_is_wrong(server, path, body, status, param):
    reply = post(server, path, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["message"] != "") == (status, True), reply.text
    assert set(error) == {"message", "type", "param", "code"} and (param is None or error["param"] == param), error


def test_neutral_values_of_what_is_not_supported_are_accepted(server):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": None, "response_format": {"type": "text"}, "user": "me", "top_k": -1,
               "n": None, "stop": None, "seed": None, "temperature": None, "top_p": 0, "stream": None, "max_tokens": 3, "logprobs": None}
    assert post(server, CHAT, {"messages": QUESTION, **neutral}).status_code == 200


def test_half_a_surrogate_pair_breaks_nothing(server):
    assert post(server, CHAT, {"messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 3}).status_code == 200
    assert post(server, TEXT, {"prompt": "\udfff", "echo": True, "max_tokens": 1}).json()["choices"][0]["text"].startswith("\udfff")
    assert post(server, TEXT, {"prompt": "x", "stop": "\ud83d", "max_tokens": 3}).status_code == 400
    assert post(server, "/render", {"text": "\ud800 $\udfff$"}).status_code == 400 == post(server, TEXT, {"prompt": "x", "model": "\ud800"}).status_code


@pytest.mark.parametrize("path, headers, status", [(CHAT, {}, 413), ("/nothing", {}, 413), (CHAT, {"host": "evil.test"}, 403), (CHAT, {"transfer-encoding": "chunked"}, 413)])
def test_who_sends_too_much_is_told_so_and_may_go_on(server, path, headers, status):
    """The reply reaches a client that is still sending, and the connection serves its next request."""
    with httpx.Client(timeout=SECONDS) as client:
        for size in (2 << 20, 9 << 20):
            content = (b"x" * (1 << 16) for _ in range(size >> 16)) if "transfer-encoding" in headers else b"x" * size
            reply = client.post(server.url + path, content=content, headers={"content-type": "application/json", **headers})
            if (path, status) == ("/nothing", 413):
                assert reply.status_code in (404, 413)
            else:
                assert reply.status_code == status and "error" in reply.json()
            assert client.get(server.url + "/health").status_code == 200


def test_a_body_without_end_is_refused_before_it_ends(server):
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=SECONDS)
    try:
        connection.putrequest("POST", CHAT)
        connection.putheader("content-length", str(1 << 40))
        connection.endheaders()
        sent = 0
        with pytest.raises(OSError):
            while sent < 1 << 30:
                connection.send(b"x" * (1 << 20))
                sent += 1 << 20
        assert sent < 256 << 20
    finally:
        connection.close()


def test_only_those_with_the_key_are_served_and_only_from_here(folder, server, capsys):
    with serve(api_key="s3cret") as guarded:
        for path in ("/v1/models", "/openapi.json", "/aqua/problem", "/nothing"):
            assert get(guarded.url + path).status_code == 401
            for wrong in ("Bearer s3cre", "Bearer s3cretx", "Bearer", "s3cret", "Basic s3cret", "Bearer é"):
                assert get(guarded.url + path, headers={"authorization": wrong.encode()}).status_code == 401
        for path in ("/health", "/metrics"):  # what a monitor asks: they hold no word and no key
            assert get(guarded.url + path).status_code == 200
        described = get(guarded.url + "/openapi.json", headers={"authorization": "Bearer s3cret"}).json()
        assert described["paths"][CHAT]["post"]["security"] == [{"key": []}] and described["paths"]["/health"]["get"]["security"] == []
        assert get(guarded.url + "/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="s3cret") as client:
            assert {model.id for model in client.models.list()} == {f"{stage}/d2" for stage in ("base", "mid", "sft", "rl")}
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert get(guarded.url + "/health", headers={"host": "any.name"}).status_code == 200
    assert get(server.url + "/health", headers={"host": "evil.test"}).status_code == 403
    assert get(server.url + "/health", headers={"host": "localhost:1"}).status_code == 200
    assert all(get(server.url + "/health", headers={"host": host}).status_code == 403 for host in ("evil.test:80", "127.0.0.1.evil.test", "", "[::1", "1.2.3.4"))
    reply = post(server, CHAT, {"messages": QUESTION}, origin="http://evil.test")
    assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers
    assert post(server, CHAT, {"messages": QUESTION, "max_tokens": 1}, origin=server.url).status_code == 200
    assert httpx.options(server.url + CHAT, timeout=SECONDS, headers={"origin": server.url, "access-control-request-method": "POST"}).status_code == 405


@pytest.mark.parametrize("key", ["", "s3cret"])
def test_pages_of_other_sites_may_ask_only_where_the_operator_names_them(folder, key):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with serve(origins=("http://app.test",), api_key=key) as server:
        for origin, is_welcome in (("http://app.test", True), ("http://evil.test", False), ("https://app.test", False)):
            preflight = httpx.options(server.url + CHAT, timeout=SECONDS, headers={"origin": origin, **asked})
            assert (preflight.status_code == 200) == is_welcome == (preflight.headers.get("access-control-allow-origin") == origin)
            reply = post(server, CHAT, {"messages": QUESTION, "max_tokens": 1}, origin=origin, **({"authorization": f"Bearer {key}"} if key else {}))
            assert (reply.headers.get("access-control-allow-origin") == origin) == is_welcome
            assert reply.status_code == (200 if is_welcome or key else 403)
        if key:
            assert post(server, CHAT, {"messages": QUESTION}, origin="http://app.test").status_code == 401


def test_the_log_has_no_word_of_a_conversation(folder):
    lines = []
    with serve(log=lines.append) as server:
        post(server, CHAT + "?q=hidden", {"messages": [{"role": "user", "content": "hidden"}], "max_tokens": 2})
        get(server.url + "/hidden")
        post(server, CHAT, {"hidden": "hidden"})
        wait_until_idle(server)
    assert [re.sub(r"\d+ ms", "N ms", line) for line in lines] == [f"POST {CHAT} 200 N ms", "GET (none) 404 N ms", f"POST {CHAT} 400 N ms"]


# ---------------------------------------------------------------------------------------------------------------------
# Many at once

def endless(engine):
    """A prompt whose greedy answer has 40 tokens."""
    for text in ("a", "b", "c", "Ann", "10", "8", "cups", "boxes", "how", "many"):
        prompt = engine.tokenizer.encode(text, prepend="<|bos|>")
        if len(alone(engine, prompt, max_new_tokens=40)[0].tokens) == 40:
            return text
    raise AssertionError("every answer ends early")


def test_a_client_that_leaves_frees_its_rows_at_once(folder, engine, monkeypatch):
    text = endless(engine)
    Pace(monkeypatch).give(6)
    with serve() as server:
        for stream in (True, False):
            connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]))
            connection.request("POST", TEXT, json.dumps({"prompt": text, "temperature": 0, "max_tokens": 90, "stream": stream, "n": 3}), {"content-type": "application/json"})
            while server.pool.drivers[0].rows < 3:
                time.sleep(0.01)
            if stream:
                assert connection.getresponse().read1(10).startswith(b"data: ")
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            wait_until_idle(server)
        metrics = get(server.url + "/metrics").text
        assert "nanochat_cancelled_total 2" in metrics
        assert int(re.search(r"nanochat_generated_tokens_total (\d+)", metrics)[1]) <= 3 * (1 + 6) + 3, "the rows went on without their client"


def test_a_full_queue_says_when_to_come_back_and_health_answers_meanwhile(folder, engine, monkeypatch):
    text = endless(engine)
    pace = Pace(monkeypatch)
    with serve(max_rows=2, max_queue=2) as server:
        body = {"prompt": text, "temperature": 0, "max_tokens": 40}
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            running = [threads.submit(post, server, TEXT, body) for _ in range(4)]
            while server.pool.drivers[0].rows + server.pool.drivers[0].waiting < 4:
                time.sleep(0.01)
            refused = post(server, TEXT, body)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "queue_full"
            for path in ("/health", "/metrics"):
                assert get(server.url + path).status_code == 200
            metrics = get(server.url + "/metrics").text
            assert 'nanochat_rows{worker="0"} 2' in metrics and 'nanochat_queue{worker="0"} 2' in metrics
            pace.free()
            texts = {future.result().json()["choices"][0]["text"] for future in running}
        assert texts == {written(engine.tokenizer, alone(engine, engine.tokenizer.encode(text, prepend="<|bos|>"), max_new_tokens=40)[0])}
        assert post(server, TEXT, {**body, "n": 5}).status_code == 400, "what never fits is not asked to come back"


def test_a_request_whose_time_is_up_ends_with_what_it_has(folder, engine, monkeypatch):
    text = endless(engine)
    whole = written(engine.tokenizer, alone(engine, engine.tokenizer.encode(text, prepend="<|bos|>"), max_new_tokens=90)[0])
    Pace(monkeypatch).give(5)
    with serve(settings=Settings(timeout_s=1.0), max_rows=1) as server:
        body = {"prompt": text, "temperature": 0, "max_tokens": 90}
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            first = threads.submit(post, server, TEXT, body)
            while not server.pool.drivers[0].rows:
                time.sleep(0.01)
            second = post(server, TEXT, body)
        choice = first.result().json()["choices"][0]
        assert choice["finish_reason"] == "length" and whole.startswith(choice["text"]) and 0 < len(choice["text"]) < len(whole)
        assert first.result().json()["usage"]["completion_tokens"] == 6
        assert second.status_code in (200, 429)
        wait_until_idle(server)


def test_a_failure_inside_the_engine_is_told_and_the_next_request_is_served(folder, monkeypatch):
    with serve() as server:
        step, broken = Engine.step, threading.Event()

        def failing_step(self):
            if not broken.is_set():
                broken.set()
                raise AssertionError("the model's logits are not finite")
            return step(self)
        monkeypatch.setattr(Engine, "step", failing_step)
        assert post(server, CHAT, {"messages": QUESTION}).status_code == 500
        assert post(server, CHAT, {"messages": QUESTION}).status_code == 200
        wait_until_idle(server)
        assert "nanochat_engine_errors_total 1" in get(server.url + "/metrics").text


def test_two_workers_share_the_work_and_say_the_same(folder, engine, monkeypatch):
    text = endless(engine)
    pace = Pace(monkeypatch)
    with serve(workers=2) as server:
        body = {"prompt": text, "temperature": 0, "max_tokens": 40}
        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            running = [threads.submit(post, server, TEXT, body) for _ in range(6)]
            while sum(driver.rows for driver in server.pool.drivers) < 6:
                time.sleep(0.01)
            assert [driver.rows for driver in server.pool.drivers] == [3, 3], "least loaded first"
            pace.free()
        assert len({future.result().json()["choices"][0]["text"] for future in running}) == 1
        assert 'worker="1"' in get(server.url + "/metrics").text
        wait_until_idle(server)


def test_models_are_loaded_when_asked_for_and_the_least_used_goes(folder):
    with serve(max_models=2) as server:
        for name in ("base", "mid", "sft", "base", "rl/d2"):
            assert post(server, CHAT, {"messages": QUESTION, "model": name, "max_tokens": 1}).json()["model"] == name.partition("/")[0] + "/d2"
            assert len(server.pool.seats[server.pool.drivers[0]]) <= 2
        loaded = {one["id"] for one in get(server.url + "/v1/models").json()["data"] if one["is_loaded"]}
        assert loaded == {"base/d2", "rl/d2"}
        assert get(server.url + "/v1/models/sft").json()["id"] == "sft/d2" and get(server.url + "/v1/models/x").status_code == 404
        assert get(server.url + "/v1/info").json()["default_model"] == "rl/d2"


# ---------------------------------------------------------------------------------------------------------------------
# For the page

def test_a_problem_its_letters_and_its_attention(server, engine):
    problem = get(server.url + "/aqua/problem?index=2").json()
    assert problem["answer_letter"] == "B" and problem["num_problems"] == 10 and "What is 12 + 1?" in problem["prompt"]
    assert get(server.url + "/aqua/problem").json()["num_problems"] == 10 and get(server.url + "/aqua/problem?index=10").status_code == 404
    messages, tokenizer = [{"role": "user", "content": problem["prompt"]}], engine.tokenizer
    for text, written in (("", None), ("12 and 1", None), ("so\nAnswer: C", "C"), ("Answer: no", None)):
        said = post(server, "/aqua/letters", {"messages": messages, "text": text, "letters": problem["letters"]}).json()
        forced = "Answer:" not in text
        stem = text.partition("Answer:")[0] + "Answer:" if not forced else (text + "\nAnswer:" if text else "Answer:")
        with torch.no_grad():
            logits = engine.model(torch.tensor([tokenizer.render_prompt(messages) + tokenizer.encode(stem)]))[0, -1]
        of_letters = logits[[tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCDE"]]
        assert (said["written"], said["is_forced"]) == (written, forced)
        assert list(said["probs"].values()) == pytest.approx(of_letters.softmax(0).tolist(), abs=1e-4)
        first, second = of_letters.topk(2).values.tolist()
        assert said["margin"] == pytest.approx(first - second, abs=1e-4) and said["best"] == "ABCDE"[of_letters.argmax()]
    for head in (None, 1):
        seen = post(server, "/aqua/attention", {"messages": QUESTION, "text": "Ann has", "layer": 0, "head": head}).json()
        assert len(seen["weights"]) == len(seen["queries"]) and all(sum(row) == pytest.approx(1, abs=0.01) for row in seen["weights"])
        assert len(seen["keys"]) == len(seen["kinds"]) == len(seen["weights"][0]) and set(seen["kinds"]) <= {"question", "options", "completion", "other"}


def test_the_page_is_served_under_its_policy(folder, server, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<title>chat</title><script>1</script>")
    with serve(page=path) as with_page:
        reply = get(with_page.url + "/")
        assert reply.text == path.read_text() and "script-src 'sha256-" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert get(server.url + "/").status_code == 404
    assert post(server, "/render", {"text": "**b** <i>"}).json()["html"] == "<p><strong>b</strong> &lt;i&gt;</p>\n"


def test_rows_that_pad_the_vocabulary_are_never_said(tmp_path, monkeypatch):
    """As in checkpoints whose vocabulary was rounded up: ids without bytes are neither drawn nor alternatives, and as a prompt are refused."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    make_base(tmp_path, stages=("rl",), padding=60)
    with serve() as server:
        tokenizer = get_tokenizer()
        reply = post(server, CHAT, {"messages": QUESTION, "temperature": 2, "top_k": 0, "n": 20, "max_tokens": 30, "logprobs": True, "top_logprobs": 20})
        assert reply.status_code == 200 and len(reply.json()["choices"]) == 20
        echoed = {"prompt": [[5, 6, 7]], "echo": True, "logprobs": 20, "max_tokens": 1, "temperature": 0}
        assert len(post(server, TEXT, echoed).json()["choices"][0]["logprobs"]["top_logprobs"][1]) >= 20
        for body in ({"prompt": [[tokenizer.vocab_size]]}, {**echoed, "prompt": [[tokenizer.vocab_size]]}):
            assert post(server, TEXT, body).status_code == 400


def test_a_harness_finds_the_tokenizer_where_it_is_meant_to(server, engine):
    assert get(server.url + "/tokenizer_info").status_code == 404
    with serve(settings=Settings(tokenizer_info=True)) as telling:
        assert get(telling.url + "/tokenizer_info").json()["eos_token"] == "<|assistant_end|>"
    for text in ("Ann has 10", "<|bos|>", "a<|bos|>"):
        ids = post(server, "/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
        assert ids == ([engine.tokenizer.bos_id] if text == "<|bos|>" else engine.tokenizer.encode(text))
        assert post(server, "/detokenize", {"tokens": ids}).json()["prompt"] == text


# ---------------------------------------------------------------------------------------------------------------------
# The command

@pytest.mark.parametrize("host, is_loopback", [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.0.1", True), ("0.0.0.0", False),
                                               ("192.168.0.2", False), ("example.test", False), ("", False), ("::", False)])
def test_what_counts_as_this_machine(host, is_loopback):
    assert chat_web.is_loopback(host) == is_loopback


def test_the_key_comes_from_a_file_the_environment_or_dotenv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    assert chat_web.api_key(chat_web.Config()) == ""
    (tmp_path / ".env").write_text("X=1\nexport NANOCHAT_API_KEY='from-dotenv'\n")
    assert chat_web.api_key(chat_web.Config()) == "from-dotenv"
    monkeypatch.setenv("NANOCHAT_API_KEY", "from-environment")
    assert chat_web.api_key(chat_web.Config()) == "from-environment"
    (tmp_path / "key").write_text("from-file\n")
    assert chat_web.api_key(chat_web.Config(api_key_file=str(tmp_path / "key"))) == "from-file"
    (tmp_path / "key").write_text("two words")
    for bad in (str(tmp_path / "key"), str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(SystemExit):
            chat_web.api_key(chat_web.Config(api_key_file=bad))


def test_what_cannot_be_served_is_told_in_words(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"device_type": "cpu", "dtype": "float32"}
    with pytest.raises(SystemExit, match="NANOCHAT_API_KEY"):
        chat_web.main(chat_web.Config(host="0.0.0.0", **config))
    with pytest.raises(SystemExit, match="no worker"):
        chat_web.main(chat_web.Config(num_gpus=0, **config))
    with pytest.raises(SystemExit, match="there is no model.*run_aquarat_small"):
        chat_web.main(chat_web.Config(model_tag="d99", **config))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit, match="cannot be opened.*--port"):
            chat_web.main(chat_web.Config(port=taken.getsockname()[1], **config))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="there is no model 'rl'.*there is no rl checkpoint.*NANOCHAT_BASE_DIR"):
        chat_web.main(chat_web.Config(source="rl", **config))


def test_the_command_prints_its_address_serves_and_ends_with_sigterm(folder):
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", "-i", "rl", "-p", "0", "-n", "2", "-d", "float32", "--device-type", "cpu"],
                               cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        assert get(url + "/v1/info").json()["workers"] == 2
        with httpx.stream("POST", url + CHAT, json={"messages": QUESTION, "stream": True, "max_tokens": 5}, timeout=SECONDS) as reply:
            assert reply.read().endswith(b"data: [DONE]\n\n")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, err) == (0, ""), err
        assert "How many" not in out
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_a_pool_that_cannot_load_says_so(folder, tmp_path, monkeypatch):
    """The newest checkpoint's file is torn and there is no other."""
    with serve() as server:
        path = folder / "mid_checkpoints" / "d2" / "model_000005.pt"
        whole = path.read_bytes()
        try:
            path.write_bytes(whole[:100])
            reply = post(server, CHAT, {"messages": QUESTION, "model": "mid"})
            assert reply.status_code == 404 and "no whole checkpoint" in reply.json()["error"]["message"]
        finally:
            path.write_bytes(whole)
        assert post(server, CHAT, {"messages": QUESTION, "model": "mid", "max_tokens": 1}).status_code == 200
        assert isinstance(server.pool, Pool) and server.pool.drivers[0].load == 0
