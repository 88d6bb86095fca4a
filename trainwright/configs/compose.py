"""From Hydra's tree and the command line's overrides to a checked `Recipe`.

Every way in (a verb of the command line, a test, a notebook) goes through this module, so a wrong
recipe is one sentence everywhere, before torch is imported or a process started.
"""

import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import cast, get_type_hints

from hydra import compose, initialize_config_module
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from trainwright.configs.check import check_recipe
from trainwright.configs.hf_config import read_hf_config
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest, TrainwrightError

ConfigStore.instance().store(name="schema", node=Recipe)

# Where a run is kept, watched and saved doesn't change what it computes, so none of it names the run.
# The layout is left out too: it never changes the run, which goes on under another one.
NOT_IN_THE_NAME = (
    *("run", "resume", "monitor", "checkpoint", "parallel"),
    *("resilience", "stability", "health", "compile_cache", "launch", "cluster", "plan"),
)


def load_recipe(
    overrides: Sequence[str] = (),
    worlds: Callable[[Recipe], Sequence[int]] | None = None,
    *,
    planned: bool = False,
) -> Recipe:
    """The checked recipe that `overrides` (the command line's words) describe.

    worlds, planned: as `run_with_recipe` takes them.

    Raises:
        BadRequest: an unknown key or option, a value of the wrong type, or a recipe that can't run.
    """
    with plain_errors(overrides), initialize_config_module("trainwright.configs", version_base="1.3"):
        config = compose("config", overrides=hydra_words(overrides), return_hydra_config=True)
        name = config.hydra.runtime.choices.recipe
        with open_dict(config):
            del config["hydra"]
        return _to_recipe(config, name, worlds, planned)


def run_with_recipe(
    job: Callable[[Recipe], None],
    verb: str,
    argv: Sequence[str],
    worlds: Callable[[Recipe], Sequence[int]] | None = None,
    *,
    planned: bool = False,
    examples: str | None = None,
) -> None:
    """Run `job` under Hydra's own command line: overrides, --cfg, --help, --multirun, completion.

    `argv` is what follows `verb`. worlds: what `check_recipe` takes, of a verb that starts the ranks itself or
    knows of them. planned: as in `check_recipe`. examples: what its help shows, unless those of training.
    """

    def entry(config: DictConfig) -> None:
        try:
            job(_to_recipe(config, HydraConfig.get().runtime.choices["recipe"], worlds, planned))
        except TrainwrightError as error:
            raise _PastHydra(error) from error

    if {"-m", "--multirun"} & {*argv} and (
        name := next((w for w in argv if re.match("run.name=[^,]*$", w)), None)
    ):
        raise BadRequest(
            f"{name} would put every run of the sweep into one folder: leave it out or sweep it too"
        )
    sys.argv = ["trainwright", *hydra_words(argv)]  # where Hydra reads its words
    if {"-h", "--help"} & {*argv}:
        sys.argv.insert(1, f"hydra.help.app_name='trainwright {verb}'")
        if examples:
            sys.argv.insert(1, f"hydra.help.header='{examples}'")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it would swallow the tracebacks that we translate
    with plain_errors(argv):
        try:
            hydra_main(version_base="1.3", config_path="pkg://trainwright.configs", config_name="config")(
                entry
            )()
        except _PastHydra as carrier:
            raise carrier.error from None


class _PastHydra(BaseException):
    """Carries our one-sentence error past Hydra, which prints a preamble for every Exception."""

    def __init__(self, error: TrainwrightError) -> None:
        self.error = error


def hydra_words(words: Sequence[str]) -> list[str]:
    """`words` as Hydra takes them: it can't make a new entry of `data.mix` from ``data.mix.NAME.key=value``.

    Raises:
        BadRequest: a ``+key=value`` that Hydra would add though no recipe has such a key.
    """
    for word in words:
        key = word.lstrip("+").split("=")[0]
        if word.startswith("+") and not key.startswith("hydra.") and not _known(key):
            raise BadRequest(_unknown(key))
    return [re.sub(r"^data\.mix\.([^.=]+)\.([^.=]+)=(.*)$", r"++data.mix={\1:{\2:\3}}", word) for word in words]


def _to_recipe(
    config: DictConfig,
    recipe_name: str | None,
    worlds: Callable[[Recipe], Sequence[int]] | None = None,
    planned: bool = False,
) -> Recipe:
    recipe = cast(Recipe, OmegaConf.to_object(config))
    _take_from_pretrained(recipe)
    check_recipe(recipe, worlds(recipe) if worlds else None, planned=planned)
    if recipe.run.name is None:
        recipe.run.name = default_run_name(recipe, recipe_name or "default")
    return recipe


def _take_from_pretrained(recipe: Recipe) -> None:
    """Let the folder `model.pretrained` decide the model's shape and, unless given, the tokenizer."""
    folder = Path(recipe.model.pretrained or "").expanduser()
    if recipe.model.pretrained is None or not folder.is_dir():  # check_recipe says what is wrong
        return
    recipe.model = replace(recipe.model, **read_hf_config(folder))
    if recipe.data.tokenizer.path is None and (folder / "tokenizer.json").is_file():
        recipe.data.tokenizer.path = str(folder)


def default_run_name(recipe: Recipe, recipe_name: str) -> str:
    """The recipe's name and a short hash of all that decides what the run computes."""
    decisive = {key: value for key, value in asdict(recipe).items() if key not in NOT_IN_THE_NAME}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return f"{recipe_name.replace('/', '-')}-{digest[:8]}"


@contextmanager
def plain_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Turn the errors of Hydra and OmegaConf into one sentence that names the key and the fix."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise BadRequest(_sentence(error, overrides)) from error


def _sentence(error: BaseException, overrides: Sequence[str]) -> str:
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    text = "\n".join(str(cause) for cause in causes)

    if unknown := re.search(r"Could not override '([^']+)'|Key '[^']+' (?:is )?not in ", text):
        keys = [unknown.group(1)] if unknown.group(1) else re.findall(r"full_key: (\S+)", text)
        for key in keys:
            if not _known(key):
                return _unknown(key)
    if option := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        group, name = option.groups()
        known = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"{group}={name} is not an option of {group}; the nearest is {group}={_nearest(name, known)}"
    if config := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text):
        key = re.search(r"full_key: (\S+)", text)
        where = key.group(1) if key else "a key"
        return f"{where} takes a value of type {config.group(2).lower()}, not {config.group(1)!r}"
    if merged := re.search(r"Error merging override ([^=\s]+)=(\S+)", text):
        key, value = merged.groups()
        listed = value[0] not in "[{" and value != "null"
        hint = f" takes a list: {key}=[{value}]" if listed else f" doesn't take {value}: give it a value"
        return key + hint
    if "Ambiguous value" in text:
        return "several values for one key, as in key=1,2, are a sweep: add --multirun"
    for override in overrides:  # a group's option without an equals sign, a stray bracket
        if override in text and "parsing override" in text:
            return f"{override!r} is not of the form key=value"
    return " ".join(text.splitlines()[0].split())


def recipe_keys(schema: type = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        yield prefix + item.name
        for kind in (hints[item.name], *getattr(hints[item.name], "__args__", ())):
            if is_dataclass(kind):
                nested = "NAME." if getattr(hints[item.name], "__origin__", None) is dict else ""
                yield from recipe_keys(cast(type, kind), f"{prefix}{item.name}.{nested}")


def _unknown(key: str) -> str:
    return f"{key} is not a key of a recipe; the nearest is {_nearest(key, list(recipe_keys()))}"


def _known(key: str) -> bool:
    pattern = re.sub(r"^(data\.mix)\.[^.]+\.", r"\1.NAME.", key)
    return pattern in set(recipe_keys())


def _nearest(word: str, known: list[str]) -> str:
    """The closest of `known`: the same last part in another section counts as close."""
    same_leaf = [key for key in known if key.split(".")[-1] == word.split(".")[-1]]
    close = same_leaf or difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return close[0] if close else "none"
