# Made by docs/make.py from the rules and torch 2.13.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import TypedDict, Unpack

from fastopt.step import Nonfinite
from fastopt.torch.averaging import Averaging
from fastopt.torch.bitsandbytes import from_bitsandbytes
from fastopt.torch.classes import OfRule, optimizer
from fastopt.torch.flat import flatten_, unflatten_
from fastopt.torch.release import release_gradients_
from fastopt.torch.step import Stepping

__all__: list[str] = [
    "ADOPT",
    "AMSGrad",
    "AMSGradW",
    "ASGD",
    "AdEMAMix",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamC",
    "AdamW",
    "Adamax",
    "Adan",
    "CautiousAdamW",
    "CautiousDecayAdamW",
    "CautiousLion",
    "DAdaptAdam",
    "DoG",
    "DynamicGD",
    "FTRL",
    "GD",
    "LAMB",
    "LARS",
    "LaProp",
    "Lion",
    "MADGRAD",
    "MARS",
    "Muon",
    "NAdam",
    "NAdamW",
    "NovoGrad",
    "Prodigy",
    "QHAdam",
    "RAdam",
    "RAdamW",
    "RMSprop",
    "Rprop",
    "SGD",
    "SGDW",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Signum",
    "SophiaG",
    "StableAdamW",
    "Tiger",
    "Yogi",
    "flatten_",
    "from_bitsandbytes",
    "optimizer",
    "release_gradients_",
    "unflatten_",
]

class _Options(TypedDict, total=False):
    clip_norm: float | None
    clip_value: float | None
    nonfinite: Nonfinite
    ema: float | None
    weight_decay_mask: Callable[[str, Tensor], bool] | None
    state_dtype: torch.dtype | None
    formats: Any
    master: str | None
    copy_to: Any
    seed: int
    shard_group: Any
    threads: int | None
    backend: str | None

class ADOPT(OfRule):
    """ADOPT: Adam that divides by the previous second moment, and converges with any
    beta2."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.9999),
        eps: float = 1e-06,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class AMSGrad(OfRule):
    """AMSGrad: Adam over the largest second moment so far."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class AMSGradW(OfRule):
    """AMSGrad with decoupled weight decay: AdamW under torch's ``amsgrad=True``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class ASGD(Averaging, torch.optim.ASGD):
    """Averaged SGD: SGD with a falling step; ``eval_params()`` is the mean of all
    points after ``t0``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class AdEMAMix(OfRule):
    """AdEMAMix: AdamW with a second, slow momentum."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        alpha_warmup: float = 0.0,
        beta3_warmup: float = 0.0,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class AdaBelief(OfRule):
    """AdaBelief: Adam by the gradients' distance from their mean."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        rectify: bool = True,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Adadelta(Stepping, torch.optim.Adadelta):
    """Adadelta: scales the gradient by the ratio of two running root mean squares."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Adafactor(Stepping, torch.optim.Adafactor):
    """Adafactor: stores the second moments of a matrix as one per row and per
    column."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 0.001),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Adagrad(Stepping, torch.optim.Adagrad):
    """Adagrad: steps by the root of all squares so far."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class Adam(Stepping, torch.optim.Adam):
    """Adam; weight decay is added to the gradient, as in torch."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class AdamC(OfRule):
    """AdamC: AdamW whose decay falls with the square of the learning rate, so that the
    weights' norms do not grow at the end of a schedule."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        max_lr: float | None = None,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class AdamW(Adam, torch.optim.AdamW):
    """AdamW: Adam, weight decay decoupled."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class Adamax(Stepping, torch.optim.Adamax):
    """Adamax: Adam by the largest gradient instead of the mean square."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Adan(OfRule):
    """Adan: Adam with the momentum of the gradients' differences."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class CautiousAdamW(OfRule):
    """C-AdamW: AdamW that moves only elements whose update and gradient agree in
    sign."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class CautiousDecayAdamW(OfRule):
    """AdamW that decays only what its step does not make larger."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class CautiousLion(OfRule):
    """C-Lion: Lion that moves only elements whose update and gradient agree in sign."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class DAdaptAdam(OfRule):
    """D-Adapted Adam: Adam that finds its own learning rate; leave ``lr`` at 1."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        d0: float = 1e-06,
        use_bias_correction: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class DoG(OfRule):
    """DoG: SGD whose step is the distance from the start over the gradients' norms;
    leave ``lr`` at 1."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        reps_rel: float = 1e-06,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class DynamicGD(OfRule):
    """GD whose learning rate falls as 1 / (1 + sqrt(completed steps))."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class FTRL(OfRule):
    """FTRL-proximal: parameters that stay exactly zero under ``l1``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        l1: float = 0.0,
        l2: float = 0.0,
        l2_shrinkage: float = 0.0,
        beta: float = 0.0,
        initial_accumulator_value: float = 0.1,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class GD(OfRule):
    """GD: gradient descent."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class LAMB(OfRule):
    """LAMB: Adam's step in proportion to each array's norm."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-06,
        weight_decay: float = 0.01,
        always_adapt: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class LARS(OfRule):
    """LARS: SGD with momentum in proportion to each array's norm."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0005,
        trust_coeff: float = 0.001,
        eps: float = 1e-08,
        always_adapt: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class LaProp(OfRule):
    """LaProp: the momentum of normalised gradients."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0004,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Lion(OfRule):
    """Lion: the sign of a mixture of momentum and gradient."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MADGRAD(OfRule):
    """MADGRAD: dual averaging by the cube root of the squares, with momentum."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        momentum: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MARS(OfRule):
    """MARS-AdamW: AdamW on gradients of less variance."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.003,
        betas: tuple[float | Tensor, float | Tensor] = (0.95, 0.99),
        gamma: float = 0.025,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Muon(Stepping, torch.optim.Muon):
    """Muon: momentum made orthogonal, for matrices; AdamW for all other arrays."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-07,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class NAdam(Stepping, torch.optim.NAdam):
    """NAdam: Adam with Nesterov's momentum, warmed up."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class NAdamW(OfRule):
    """NAdamW: NAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        momentum_decay: float = 0.004,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class NovoGrad(OfRule):
    """NovoGrad: momentum of gradients normalised array by array, with one number for
    each array's second moment."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.95, 0.98),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Prodigy(OfRule):
    """Prodigy: Adam that finds its own learning rate; leave ``lr`` at 1."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        d0: float = 1e-06,
        d_coef: float = 1.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class QHAdam(OfRule):
    """QHAdam: Adam whose moments are mixed with the gradient itself."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        nu1: float = 1.0,
        nu2: float = 1.0,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class RAdam(Stepping, torch.optim.RAdam):
    """RAdam: Adam, rectified while its second moment is uncertain; before that,
    momentum."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class RAdamW(OfRule):
    """RAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class RMSprop(Stepping, torch.optim.RMSprop):
    """RMSprop."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Rprop(Stepping, torch.optim.Rprop):
    """Rprop: only the gradients' signs count, and each parameter has its step."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-06, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class SGD(Stepping, torch.optim.SGD):
    """SGD with momentum."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class SGDW(OfRule):
    """SGD with momentum, weight decay decoupled."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.01,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class ScheduleFreeAdamW(Averaging, OfRule):
    """Schedule-free AdamW: needs no schedule and no known number of steps."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        warmup_steps: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class ScheduleFreeRAdam(Averaging, OfRule):
    """Schedule-free RAdam: needs no schedule, no warmup and no known number of
    steps."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class ScheduleFreeSGD(Averaging, OfRule):
    """Schedule-free SGD: needs no schedule and no known number of steps."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Signum(OfRule):
    """Signum: the sign of the momentum."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class SophiaG(OfRule):
    """Sophia-G: momentum by a clipped estimate of the Hessian's diagonal."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0001,
        betas: tuple[float | Tensor, float | Tensor] = (0.965, 0.99),
        rho: float = 0.04,
        bs: float = 5120.0,
        weight_decay: float = 0.1,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class StableAdamW(OfRule):
    """StableAdamW: AdamW whose learning rate is clipped, array by array, by how
    surprising the gradients are."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        eps: float = 1e-06,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Tiger(OfRule):
    """Tiger: the sign of the momentum, with defaults that train large models on one
    state buffer."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class Yogi(OfRule):
    """Yogi: Adam whose second moment moves by a bounded amount."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 0.001,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 1e-06,
        *,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...
