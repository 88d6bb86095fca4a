"""The front door: `trainwright VERB ...`. Verbs are imported when called, so help needs no torch."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

from trainwright import verdict
from trainwright.errors import INTERRUPTED, BadRequest, TrainwrightError


class Verb(NamedTuple):
    """A verb's line in the help and the function ``module:name`` that takes its recipe."""

    help: str
    target: str
    example: str


VERBS = {
    "train": Verb("train a model from a recipe", "trainwright.trainers.train:train", "trainwright train"),
    "health": Verb(
        "check that the nodes are fit to train on",
        "trainwright.trainers.health.verb:health",
        "trainwright health health.memory_gib=4",
    ),
    "data": Verb(
        "fetch and index a recipe's data, and show what the stream looks like",
        "trainwright.trainers.data.describe:describe",
        "trainwright data data=text data.paths=[book.txt]",
    ),
    "plan": Verb(
        "work out what a run would do on machines that aren't at hand",
        "",  # as launch: its second word has one
        "trainwright plan recipe=llama2_7b cluster=trn1.32xlarge cluster.nodes=128",
    ),
    "launch": Verb(
        "start a run's ranks, keep them going, and end with a status to act on",
        "",  # its targets have one each
        "trainwright launch torchrun launch.procs_per_node=2 train.steps=20",
    ),
}

# The verbs that compute on a device: its libraries read the environment while their module imports torch.
ON_A_DEVICE = ("train", "health")

# Where `launch` starts a run: its second word.
TARGETS = {
    "torchrun": Verb(
        "this node's ranks, by torchrun under a supervisor",
        "trainwright.launch.torchrun",
        VERBS["launch"].example,
    ),
}

# What `plan` works out: its second word; the first where a recipe comes at once.
SUBJECTS = {
    "layout": Verb(
        "the memory, the traffic and the time of a step, and what they cost; --rehearse takes the step besides",
        "trainwright.trainers.plan.layout_verb:plan_layout",
        f"{VERBS['plan'].example}\n  {VERBS['plan'].example} --rehearse",
    ),
    "search": Verb(
        "the layouts that a cluster can run, the fastest first, and why the others can't be",
        "trainwright.trainers.plan.search_verb:plan_search",
        "trainwright plan search recipe=llama2_7b cluster=trn1.32xlarge cluster.nodes=128",
    ),
    "scaling": Verb(
        "how much of a node's pace is left on more of them",
        "trainwright.trainers.plan.scaling_verb:plan_scaling",
        "trainwright plan scaling recipe=llama2_7b cluster=trn1.32xlarge cluster.nodes=256",
    ),
    "goodput": Verb(
        "how far apart saves should be, and how much of a long run trains the model",
        "trainwright.trainers.plan.goodput_verb:plan_goodput",
        "trainwright plan goodput cluster.nodes=128 plan.measured=runs/mine",
    ),
}


def usage() -> str:
    """The text of ``trainwright --help``."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    examples = "\n".join(f"  {verb.example}" for verb in VERBS.values())
    return (
        "Usage: trainwright VERB [recipe=NAME] [key=value ...] [--debug]\n\n"
        f"Verbs:\n{verbs}\n\nExamples:\n{examples}\n  trainwright train --help\n"
    )


def second_usage(verb: str, word: str, choices: dict[str, Verb]) -> str:
    """The text of ``trainwright launch --help`` and its like; `word` is what the second word is called."""
    width = max(map(len, choices))
    lines = "\n".join(f"  {name:<{width}}  {choice.help}" for name, choice in choices.items())
    examples = "\n".join(f"  {choice.example}" for choice in choices.values())
    return (
        f"Usage: trainwright {verb} {word.upper()} [recipe=NAME] [key=value ...] [--debug]\n\n"
        f"{word.capitalize()}s:\n{lines}\n\nExamples:\n{examples}\n"
        f"  trainwright {verb} {next(iter(choices))} --help\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit status (see docs/architecture.md for the table)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if words[0] == "--version":
        from trainwright import __version__

        print(f"trainwright {__version__}")
        return 0
    if words[0] in ("-sc", "--shell-completion"):
        words = _completion_words(words)
    with verdict.ending_at_once() if words[0] in ("train", "launch") else nullcontext():
        return _outcome(words, debug)


def _outcome(words: list[str], debug: bool) -> int:
    """The exit status of the verb that `words` start with."""
    try:
        if words[0] == "launch":
            return _launch(words[1:], debug)
        verdict.begin()
        with _one_speaker(debug):
            _run(words[0], words[1:], debug)
    except TrainwrightError as error:
        verdict.leave(error.status, str(error))
        if debug:
            traceback.print_exception(error)
        else:
            print(f"trainwright: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        verdict.leave(INTERRUPTED, "interrupted")
        print("trainwright: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        verdict.leave(1, f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
    verdict.leave(0)
    return 0


def _completion_words(words: list[str]) -> list[str]:
    """Hydra's completion script calls `trainwright -sc query=SHELL`, with the line typed in COMP_LINE.

    Hydra knows of no verbs, so the verb is taken out of the line for it.
    """
    program, *typed = os.environ.get("COMP_LINE", "trainwright").split(" ")
    if typed[:1] in (["launch"], ["plan"]):  # another word to take out, and the same keys
        typed = ["train", *typed[2 if typed[1:2] and "=" not in typed[1] else 1 :]]
    verb = typed[0] if typed and typed[0] in VERBS else "train"
    os.environ["COMP_LINE"] = " ".join([program, *(typed[1:] if verb in typed[:1] else typed)])
    return [verb, *words]


@contextmanager
def _one_speaker(debug: bool) -> Iterator[None]:
    """Among the ranks of a launcher, a failure ends the process once it is clear which rank says why."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
            raise
        from trainwright.trainers.parallel.first_failure import say_once

        sys.exit(say_once(error, debug))


def _asks_for_help(verb: str, kind: str, choices: dict[str, Verb], words: list[str]) -> bool:
    """Whether the second word asks for help, which is then printed, or names one of `choices`."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(second_usage(verb, kind, choices), end="")
        return True
    if words[0] not in choices:
        raise BadRequest(f"{words[0]} is not a {kind} of trainwright {verb}: {', '.join(choices)} is")
    return False


def _with_subject(words: list[str]) -> list[str]:
    """The words after `plan`, with its subject where they begin with the recipe; --rehearse as a key."""
    words = ["plan.rehearse=true" if word == "--rehearse" else word for word in words]
    asks = words[:1] in (["-h"], ["--help"])
    return ["layout", *words] if words and not asks and re.match(r"[-+~]|.*=", words[0]) else words


def _run(name: str, words: list[str], debug: bool) -> None:
    if name not in VERBS:
        raise BadRequest(f"{name} is not a verb of trainwright: {', '.join(VERBS)} are")
    chosen = VERBS[name]
    options: dict[str, Any] = {}
    if name == "plan":
        words = _with_subject(words)
        if _asks_for_help("plan", "subject", SUBJECTS, words):
            return
        from trainwright.configs import planned

        subject, *words = words
        name, chosen = f"plan {subject}", SUBJECTS[subject]
        worlds = planned.planned_worlds if subject == "layout" else planned.any_world
        if subject != "layout" and "plan.rehearse=true" in map(str.lower, words):
            raise BadRequest(f"--rehearse goes with trainwright plan layout, not with {name}: leave it out")
        options = {"worlds": worlds, "planned": True, "examples": chosen.example}
    from trainwright.configs.compose import run_with_recipe
    from trainwright.configs.schema import Recipe
    from trainwright.trainers.platform.environment import environment_of

    module, function = chosen.target.split(":")

    def job(recipe: Recipe) -> None:
        # Inside Hydra, which would print a preamble on every rank; a failure is said before graphs are copied.
        with ExitStack() as after, _one_speaker(debug):
            if name in ON_A_DEVICE:
                after.enter_context(environment_of(recipe))
            verb: Callable[[Recipe], None] = getattr(import_module(module), function)
            verb(recipe)

    run_with_recipe(job, name, words, **options)


def _launch(words: list[str], debug: bool) -> int:
    """The exit status of what `words` launch: a target's name and the words of a recipe."""
    if _asks_for_help("launch", "target", TARGETS, words):
        return 0
    name, *words = words
    if {"-m", "--multirun"} & {*words}:
        raise BadRequest("trainwright launch starts one run: leave --multirun out and launch each of the sweep")
    from trainwright.configs.compose import run_with_recipe
    from trainwright.configs.schema import Recipe

    target = import_module(TARGETS[name].target)
    statuses = [0]  # where Hydra only prints, no job is called

    def job(recipe: Recipe) -> None:
        statuses.append(target.launch(recipe, [*words, *(["--debug"] if debug else [])]))

    try:
        run_with_recipe(job, f"launch {name}", words, target.worlds)
    except TrainwrightError as error:
        target.tell_why(error.status, str(error))
        raise
    return statuses[-1]
