"""Hugging Face causal language models and our own GPT behind one small interface, a Policy:

    policy(inputs, targets, documents, positions)  -> log p of each target (B, T), 0 where it is -1: what both stages train on
    policy.tokenizer                               render_conversation, render_for_completion, decode, bos_id (which pads)
    policy.engine(max_rows)                        generate(requests), refresh(): tokens from a copy of the weights in the activations' dtype
    policy.blocks(), policy.tensors()              what is sharded and compiled; what each learning rate is for
    policy.save(folder, weights)                   and `open_policy(folder)` is the same policy again
"""
import copy
import dataclasses
import inspect
import json
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from nanochat.checkpoint_manager import META, check_tokenizer, newest_whole, read_tensors, write_tensors
from nanochat.common import write_atomic
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_model import context_length, load_hf
from nanochat.huggingface.tokenizer import tokenizer_json
from nanochat.rl.update import target_logprobs
from nanochat.tokenizer import Tokenizer, split_pattern
from dev.integration_training.rollouts.generate import HFEngine, cast_weights
from dev.integration_training.rollouts.hf_chat import ChatTokenizer

TINY = ("tiny-gpt", "tiny-qwen2")
TINY_WIDTH, TINY_LAYERS, TINY_VOCAB = 64, 2, 384
OWN_FILE = "model.json"
CHATML = ("{%- for message in messages -%}{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}{%- endfor -%}"
          "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}")


class Policy(nn.Module):
    """Children have `model`, `tokenizer`, `width`, `context`."""

    def tensors(self):
        """{"embedding", "unembedding", "matrix", "vector"} -> [(name, parameter)]; each parameter once, tied ones as embedding."""
        embedding, head = self.embeddings()
        kinds = {id(head): "unembedding", id(embedding): "embedding"}
        found = {"embedding": [], "unembedding": [], "matrix": [], "vector": []}
        for name, weight in self.named_parameters():
            found[kinds.get(id(weight), "matrix" if weight.ndim >= 2 else "vector")].append((name, weight))
        return found

    def compile_blocks(self):
        for block in self.blocks():
            block.compile()


class OwnPolicy(Policy):
    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer, self.width, self.context = model, tokenizer, model.config.n_embd, model.config.sequence_len

    def forward(self, inputs, targets, documents=None, positions=None, temperature=1.0, top_k=None):
        return target_logprobs(self.model, self.model.hidden(inputs, documents=documents), targets, temperature, top_k)

    def logits(self, inputs, documents=None, positions=None):
        return self.model(inputs, documents=documents)

    def blocks(self):
        return list(self.model.transformer.h)

    def embeddings(self):
        return self.model.transformer.wte.weight, self.model.lm_head.weight

    def engine(self, max_rows):
        return Engine(self.model, self.tokenizer, max_rows)

    def save(self, folder, weights):
        self.tokenizer.save(folder)
        write_atomic(folder / OWN_FILE, json.dumps(dataclasses.asdict(self.model.config)))
        write_tensors(folder / "model.pt", {name.removeprefix("model."): weight for name, weight in weights.items()})


class HFPolicy(Policy):
    def __init__(self, model, tokenizer, dtype, max_length):
        super().__init__()
        self.model, self.dtype, self.hf_tokenizer = model, dtype, tokenizer
        self.tokenizer = ChatTokenizer(tokenizer)
        text = getattr(model.config, "text_config", None) or model.config
        self.width, self.context = text.hidden_size, min(max_length, context_length(model, tokenizer))

    def forward(self, inputs, targets, documents=None, positions=None, temperature=1.0, top_k=None):
        wanted = targets != -1
        logits = self.logits(inputs, documents, positions)[wanted]  # (N, V): picked out before anything is made of them
        result = torch.zeros(targets.shape, device=inputs.device)
        # a softmax over a vocabulary of 150,000 is computed again in the backward pass rather than kept
        result[wanted] = checkpoint(token_logprobs, logits, targets[wanted], temperature, top_k, use_reentrant=False)
        return result

    def logits(self, inputs, documents=None, positions=None):
        """(B, T, V). With documents, a position sees its own alone, and its position is counted inside it."""
        others = {}
        if documents is not None:
            T, least = inputs.size(1), torch.finfo(self.dtype).min
            sees = (documents[:, :, None] == documents[:, None, :]) & torch.ones(T, T, dtype=torch.bool, device=inputs.device).tril()
            # as numbers to be added: every attention implementation but Flash's takes these
            others = {"position_ids": positions, "attention_mask": torch.where(sees, 0.0, least).to(self.dtype)[:, None]}
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(input_ids=inputs, use_cache=False, **others).logits

    def blocks(self):
        """The longest list of modules inside: its layers."""
        return list(max((module for module in self.model.modules() if isinstance(module, nn.ModuleList)), key=len))

    def embeddings(self):
        head = self.model.get_output_embeddings()
        return self.model.get_input_embeddings().weight, None if head is None else head.weight

    def engine(self, max_rows):
        return HFEngine(self.model, self.tokenizer, self.context, self.dtype, max_rows)

    def save(self, folder, weights):
        self.model.save_pretrained(folder, state_dict={name.removeprefix("model.", ): weight for name, weight in weights.items()})
        self.hf_tokenizer.save_pretrained(folder)


def token_logprobs(logits, targets, temperature, top_k):
    """logits (N, V), targets (N,) -> log p (N,) float32 at a temperature, renormalised on the top_k likeliest."""
    logits = logits.float() / temperature
    kept = logits if top_k is None else logits.topk(min(top_k, logits.size(1)), dim=1).values
    return logits.gather(1, targets[:, None])[:, 0] - kept.logsumexp(dim=1)


# -- opening ----------------------------------------------------------------------------------------------------------

def open_policy(name, dtype, compute, max_length):
    """A Hugging Face name or folder, a folder of our checkpoints, or a folder that `save` wrote -> Policy on the device, in train mode."""
    folder = Path(name).expanduser()
    if (folder / OWN_FILE).is_file():
        config = GPTConfig(**json.loads((folder / OWN_FILE).read_text(encoding="utf-8")))
        policy = own_policy(config, read_tensors(folder / "model.pt"), Tokenizer.load(folder), dtype)
    elif folder.is_dir() and any(META.fullmatch(path.name) for path in folder.iterdir()):
        meta = newest_whole(folder)
        if meta is None:
            raise ValueError(f"there is no whole checkpoint in {folder}: train that stage again, or name another folder")
        tokenizer = Tokenizer.load(folder.parent.parent / "tokenizer")
        check_tokenizer(tokenizer, meta, folder)
        policy = own_policy(GPTConfig(**meta["model_config"]), read_tensors(folder / f"model_{meta['step']:06d}.pt"), tokenizer, dtype)
    else:
        # float32 whatever the activations are: an AdamW step of 1e-5 is lost in bfloat16's rounding
        model, tokenizer = load_hf(name, dataclasses.replace(compute, dtype=torch.float32))
        check_packs(model)
        policy = HFPolicy(model, tokenizer, dtype, max_length)
    if policy.context < max_length:
        raise ValueError(f"max_length={max_length} is more than the {policy.context} tokens that {name} reads: lower max_length")
    return policy.to(compute.device).train()


def check_packs(model):
    names = inspect.signature(model.forward).parameters
    if not {"position_ids", "attention_mask"} <= set(names):
        raise ValueError(f"{type(model).__name__} takes no position_ids and attention_mask, so packed conversations would see each other: use another model")


def own_policy(config, weights, tokenizer, dtype):
    model = GPT(config, dtype)
    model.load_state_dict(weights)
    return OwnPolicy(model, tokenizer)


def make_tiny(name, texts, max_length, seed, folder):
    """A fresh tiny-gpt or tiny-qwen2 and its tokenizer, trained on the texts -> `folder`, from where `open_policy` takes it."""
    # Qwen2's tokenizer class splits numbers into digits, whatever a file says; the tiny GPT has numbers below 100 whole
    tokenizer = Tokenizer.train(iter(texts), TINY_VOCAB, split_pattern(1 if name == "tiny-qwen2" else 2), num_threads=1)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tiny-gpt":
        model = GPT(GPTConfig(max_length, tokenizer.vocab_size, TINY_LAYERS, 2, 2, TINY_WIDTH))
        model.init_weights(seed)
        OwnPolicy(model, tokenizer).save(folder, OwnPolicy(model, tokenizer).state_dict())
        return
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    bpe = tokenizer_json(tokenizer)["model"]
    theirs = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]], unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                            additional_special_tokens=["<|im_start|>"], model_max_length=max_length)
    theirs.chat_template = CHATML
    theirs.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(Qwen2Config(vocab_size=len(theirs), hidden_size=TINY_WIDTH, intermediate_size=4 * TINY_WIDTH, num_hidden_layers=TINY_LAYERS, num_attention_heads=2,
                                     num_key_value_heads=1, max_position_embeddings=max_length, initializer_range=0.1, bos_token_id=None,
                                     eos_token_id=theirs.eos_token_id, pad_token_id=theirs.pad_token_id)).save_pretrained(folder)


def frozen_copy(policy, dtype):
    """The same policy with weights of its own in the activations' dtype, for sampling while the original is sharded or compiled."""
    return cast_weights(copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer}), dtype)
