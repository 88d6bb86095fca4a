"""From a task to what trains it: the model cut and laid out on the ranks, its weights, and the stepper."""

import torch
from torch import nn

from trainwright.configs.schema import Recipe
from trainwright.trainers.checkpoint.load import read_state
from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.parallel.apply import Layout, parallelize
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.parallel.shards import local_pieces, materialise
from trainwright.trainers.parallel.stages import Stages, layers_of_rank
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.precision import PRECISIONS, REDUCES
from trainwright.trainers.steppers.base import Stepper
from trainwright.trainers.steppers.eager import EagerStepper
from trainwright.trainers.tasks.base import Task


def build_stepper(
    recipe: Recipe, task: Task, ranks: Ranks, platform: Platform, checkpoint: Place | None
) -> tuple[Stepper, int]:
    """The task's model on its ranks, with initial weights or a checkpoint's, and its number of parameters."""
    model, layout, parameters = lay_out_model(recipe, task, ranks, platform)
    materialise(model, platform.device)
    if checkpoint is None:
        task.fill(local_pieces(model))
    stepper = stepper_of(model, layout, recipe, task, platform.device)
    if checkpoint is not None:
        state = stepper.state_dict()
        read_state(checkpoint, state, alone=ranks.size == 1)
        stepper.load_state_dict(state)
    return stepper, parameters


def lay_out_model(
    recipe: Recipe, task: Task, ranks: Ranks, platform: Platform
) -> tuple[nn.Module, Layout, int]:
    """A rank's part of the task's model, still on the meta device, and the number of all parameters."""
    precision = PRECISIONS[recipe.precision.mode]
    model = task.build_model(platform)
    parameters = sum(p.numel() for p in model.parameters())
    if ranks.degrees.pp > 1:
        own = layers_of_rank(recipe, ranks.pp_rank, ranks.degrees.pp)
        model = Stages(task.build_model(platform, layers) for layers in own)
    layout = parallelize(
        model.to(precision.kept_in),
        *task.plan(),
        ranks,
        recipe.parallel,
        precision.computes_in,
        platform,
        REDUCES[recipe.precision.reduce],
    )
    return model, layout, parameters


def stepper_of(model: nn.Module, layout: Layout, recipe: Recipe, task: Task, device: torch.device) -> Stepper:
    """What computes a step of `model`, which has its weights or gets a checkpoint's."""
    if isinstance(model, Stages):
        from trainwright.trainers.steppers.pipeline import PipelineStepper

        return PipelineStepper(model, task.loss, recipe, layout, device)
    return EagerStepper(model, task.loss, recipe, layout, device)
