"""The norm of the weights that a run starts from, beside the one that its recipe leads to expect."""

from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run


class InitialNorm(Observer):
    """Says `initial_norm` after a fresh run's first step, whose `param_norm` is that of the weights before it.

    expected: of weights that were drawn (docs/numerics.md); where it isn't `param_norm` to a few digits, some
    weights aren't what they should be.
    """

    def on_start(self, run: Run, progress: Progress) -> None:
        self.run = run

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        if progress.step != 1 or self.run.again:
            return
        model = self.run.recipe.model
        said = {"param_norm": metrics["param_norm"]}
        if model.pretrained is None:
            from trainwright.models.init import initial_norm  # torch: a recipe is refused without it

            said["expected"] = initial_norm(model)
        self.run.emit("initial_norm", **said)
