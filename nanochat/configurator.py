"""One frozen dataclass -> command-line flags with help, a --config file, and checkpoint metadata. Cyclopts does the parsing.

    @dataclass(frozen=True)
    class Config:
        '''Pretrain a base model.'''
        device_batch_size: int = 32  # [-b] sequences per rank per forward pass

gives --device-batch-size, --device_batch_size and -b. The comment behind a field is its help; a leading [-x] is its short name.
"""
import difflib
import inspect
import io
import sys
import tokenize
import tomllib
import types
import typing
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import cyclopts

__all__ = ["parse", "inherit", "config_dict", "field_help"]


def parse(Config, argv=None):
    """Command line -> a Config. A bare `--` in front is skipped; `--config file.toml` sets defaults that flags override.

    A wrong flag or value prints what is wrong with the nearest flag's name and exits with status 2, as command lines do.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--"]:
        argv = argv[1:]
    argv, config_file = take_config_file(argv)
    hints, parameters = typing.get_type_hints(Config), []
    for field, (short, text) in zip(fields(Config), field_help(Config).values()):
        names = [f"--{field.name.replace('_', '-')}"] + ([short] if short else [])
        hint = hints[field.name]
        default = field.default if field.default is not MISSING else inspect.Parameter.empty
        several = {"consume_multiple": True} if typing.get_origin(hint) in (tuple, list) else {}
        # --x=False says what --no-x would, and cannot shadow a field that is itself called no_x
        annotation = typing.Annotated[hint, cyclopts.Parameter(name=names, help=text, negative=(), show_default=True, **several)]
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))

    def collect(**values):
        return Config(**values)

    collect.__signature__ = inspect.Signature(parameters)
    collect.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = cyclopts.App(name=f"python -m {running_module()}", help=inspect.getdoc(Config), default_command=collect,
                       version_flags=[], help_flags=["--help", "-h"], result_action="return_value")
    if config_file:
        check_config_file(config_file, hints)
        app.config = cyclopts.config.Toml(config_file, must_exist=True, use_commands_as_keys=False)
    config = app(last_of_each([spell_out(token, hints) for token in argv], hints), exit_on_error=True)
    if config is None:  # --help has been printed
        raise SystemExit(0)
    return config


def spell_out(token, hints):
    """`--top_k=None` -> what cyclopts reads as None for an optional field, `--top_k` -> `--top-k`; everything else unchanged."""
    name, equals, value = token.partition("=")
    field = name[2:].replace("-", "_")
    if not name.startswith("--") or field not in hints:
        return token
    optional = typing.get_origin(hints[field]) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hints[field])
    return f"--{field.replace('_', '-')}{equals}{'none' if optional and value == 'None' else value}"


def last_of_each(argv, hints):
    """Of several `--name=value` of one name the last counts, so that a launcher's settings can be overridden behind them; lists add up."""
    lists = {f"--{name.replace('_', '-')}" for name, hint in hints.items() if typing.get_origin(hint) in (tuple, list)}
    names = [token.partition("=")[0] if token.startswith("--") and "=" in token else None for token in argv]
    names = [name if name not in lists else None for name in names]
    return [token for i, (token, name) in enumerate(zip(argv, names)) if name is None or name not in names[i + 1:]]


def take_config_file(argv):
    """argv -> (argv without --config, the file's path or None)."""
    rest, config_file = [], None
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            config_file = next(tokens, None)
            if config_file is None:
                raise SystemExit("--config needs a file: --config run.toml")
        elif token.startswith("--config="):
            config_file = token.split("=", 1)[1]
        else:
            rest.append(token)
    if config_file and not Path(config_file).is_file():
        raise SystemExit(f"--config {config_file}: no such file")
    return rest, config_file


def check_config_file(path, hints):
    """Exit with status 2 at the first key of the file that is no flag, naming the nearest one."""
    for key in tomllib.loads(Path(path).read_text(encoding="utf-8")):
        if key.replace("-", "_") not in hints:
            nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0)
            print(f"{path}: there is no option {key!r}. Did you mean {nearest[0]!r}?", file=sys.stderr)
            raise SystemExit(2)


def running_module():
    """The name under `python -m`, for the usage line."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def field_help(Config):
    """{field name: (short flag or "", help)} from the comments behind the fields in the class's source."""
    source = inspect.getsource(Config)
    comments = {token.start[0]: token.string.lstrip("# ").strip()
                for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    lines = source.splitlines()
    helps = {}
    for field in fields(Config):
        number = next((i for i, line in enumerate(lines, 1) if line.strip().startswith(f"{field.name}:")), None)
        text = comments.get(number, "")
        short = ""
        if text.startswith("[-") and "]" in text:
            short, text = text[1:text.index("]")], text[text.index("]") + 1:].strip()
        helps[field.name] = (short, text)
    return helps


def inherit(config, parent_config, *names):
    """Fields of `config` that are None take the parent checkpoint's value. ValueError names a field the parent lacks."""
    missing = [name for name in names if getattr(config, name) is None and name not in parent_config]
    if missing:
        raise ValueError(f"{', '.join(missing)} is None, which means 'as in the parent checkpoint', "
                         f"but the parent's config has only {', '.join(sorted(parent_config))}: give a value")
    return replace(config, **{name: parent_config[name] for name in names if getattr(config, name) is None})


def config_dict(config):
    """A Config -> JSON-able dict for a checkpoint's metadata."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
