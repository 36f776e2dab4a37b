"""A step of the plan as a function in a runtime: what the solver calls is built once, and kept."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dgfast.graph import Function
from dgfast.guidance import CarriedGradient, DiscriminatorGuidance, Guidance
from dgfast.guidance.memory import Memory
from dgfast.job import Job
from dgfast.networks import one_hot
from dgfast.plan import Step
from dgfast.runtimes import Kept, Runtime
from dgfast.solvers import Call


class Stepping:
    """The steps of a job in a runtime.

    Attributes:
        guidances: those of the plan's calls, and how many calls have them. remembers: whether any of them remembers.
        captures: whether the runtime records a whole step at its first call. functions: those that were built.
    """

    def __init__(self, job: Job, runtime: Runtime, device: torch.device, state_dtype: torch.dtype) -> None:
        self._job, self._runtime, self._device, self._state_dtype = job, runtime, device, state_dtype
        self._solver, self._keep = job.solver, job.guidance.dg_every > 1
        self._capture = runtime.capture(device)
        self.functions = Kept()
        self.guidances = Counter(g for step in job.steps for g in (step.predictor, step.corrector) if g is not None)
        self.remembers = any(map(_remember, self.guidances))
        self.captures = self._capture is not None

    def __call__(
        self, step: Step, arguments: tuple[Tensor | None, ...], carried: CarriedGradient | None
    ) -> tuple[Tensor, ...]:
        """(x_hat, t_hat, t_next, labels, *inputs, *conditions, *memory) -> (x_next, denoised, log_ratio, *memory).

        The `inputs` are the solver's; a memory is there where a guidance remembers.
        """
        return self._step_function(step, arguments, carried)(*arguments)

    def prepare(self, batch: int) -> None:
        """Build every function that the plan calls for batches of this size."""
        functions = [self._job.called(guidances, self._keep) for guidances in self.guidances]
        self._runtime.prepare([(one, self._call_example(one.guidances, batch)) for one in functions])
        for call, _ in self.calls(batch):
            call()

    def calls(self, batch: int) -> Iterator[tuple[Callable[[], object], int]]:
        """Each function of the plan, called with zeros, and how often the plan calls it."""
        with torch.no_grad():
            for guidances, count in self.guidances.items():
                example = self._call_example(guidances, batch)
                function = self.function(guidances, example, self._keep)
                yield partial(function, *example), count

    def _call_example(self, guidances: Sequence[Guidance], batch: int) -> tuple[Tensor | None, ...]:
        job, learned = self._job, self._solver.function == "posterior"
        x, *others = self.example(batch)
        bounds = uploaded([job.steps[0].log_variances], x)[0] if learned else ()
        conditions = (torch.zeros(batch, *shape, device=self._device) for shape in job.conditions.values())
        return x, *others, *bounds, *conditions, *([x] if _remember(guidances) else [])

    def example(self, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """A state of zeros [batch, C, H, W], noise levels [batch] of 1 and rows of class 0, or None without classes."""
        x = torch.zeros((batch, *self._job.shape), dtype=self._state_dtype, device=self._device)
        classes = self._job.classes
        return (
            x,
            torch.ones_like(x[:, 0, 0, 0]),
            one_hot([0] * batch, classes, batch, self._device) if classes else None,
        )

    def _step_function(
        self, step: Step, example: tuple[Tensor | None, ...], carried: CarriedGradient | None
    ) -> Function:
        inputs = self._solver.inputs

        def advance(
            x_hat: Tensor, t_hat: Tensor, t_next: Tensor, labels: Tensor | None, *more: Tensor
        ) -> tuple[Tensor, ...]:
            memory = Memory(more[-1]) if self.remembers else None
            extra = more[len(inputs) : len(inputs) + len(self._job.conditions)]
            predict = self._call(step.predictor, labels, extra, step.carried[0], carried, memory)
            correct = None
            if step.corrector is not None:
                correct = self._call(step.corrector, labels, extra, step.carried[1], carried, memory, second=True)
            named = dict(zip(inputs, more[: len(inputs)], strict=True))
            x, denoised, log_ratio = self._solver.step(x_hat, t_hat, t_next, predict, correct, named)
            return x.to(self._state_dtype), denoised, log_ratio, *([memory.kept] if memory else [])

        if self._capture is None or carried is not None:  # what is carried lives outside of any one step
            return advance
        identity = "step", step.predictor, step.corrector
        return self.functions(identity, example, partial(self._capture, advance, example))

    def _call(
        self,
        guidances: tuple[Guidance, ...],
        class_labels: Tensor | None,
        extra: Sequence[Tensor] = (),
        reusing: DiscriminatorGuidance | None = None,
        carried: CarriedGradient | None = None,
        memory: Memory | None = None,
        second: bool = False,
    ) -> Call:
        """The solver's function under the given guidances, with the conditions `extra`.

        Args:
            second: leave the memory as it is.
        """
        coords, memory = self._job.coordinates, memory if _remember(guidances) else None

        def call(x: Tensor, t: Tensor, *bounds: Tensor) -> tuple[Tensor, ...]:
            sigma = coords.sigma(t).flatten()
            # A velocity is asked for at the path's own state: at its beginning s is 0.
            seen = x if self._solver.function == "velocity" else (x / coords.s(t)).to(self._state_dtype)
            arguments = seen, sigma, class_labels, *bounds, *extra
            if memory is not None:
                arguments = *arguments, memory.kept
            results = self.function(guidances, arguments, carried is not None)(*arguments)
            if memory is not None:
                results, kept = results[:-1], results[-1]
                memory.kept = memory.kept if second else kept
            if carried is None:
                return results
            denoised, log_ratio, *gradient = results
            if gradient:
                carried.keep(sigma, gradient[0])
            if reusing is not None:
                denoised = denoised + carried.correction(sigma, reusing.weight_at(sigma)).to(denoised.dtype)
            return denoised, log_ratio

        return call

    def function(
        self, guidances: tuple[Guidance, ...], example: tuple[Tensor | None, ...], keep: bool = False
    ) -> Function:
        """The job's function of these guidances in this runtime, built once for each form of its arguments.

        Args:
            keep: return the discriminator's gradient too, where there is one.
        """
        function = self._job.called(guidances, keep)
        return self.functions(function.identity, example, partial(self._runtime.build, function, example))


def uploaded(pairs: Sequence[tuple[float, float]], state: Tensor) -> Tensor:
    """The pairs for every sample of a state, [pairs, 2, B] of its type: at once, as an upload waits for its device."""
    return torch.tensor(pairs, dtype=state.dtype).to(state.device).view(-1, 2, 1).repeat(1, 1, len(state))


def _remember(guidances: Sequence[Guidance]) -> bool:
    return any(guidance.remembers for guidance in guidances)
