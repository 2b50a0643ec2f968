"""The older name of scripts.chat_sft: `python -m scripts.sft_train` runs it."""
from nanochat.configurator import parse
from scripts.chat_sft import Config, main

if __name__ == "__main__":
    main(parse(Config))
