# Made by docs/make.py from the rules.

from collections.abc import Callable
from typing import Any, SupportsFloat, TypeAlias

from typing_extensions import TypedDict, Unpack

from fastopt.optimizer.optimizer import Optimizer
from fastopt.rule import Rule

__all__: list[str] = [
    "RULES",
    "adabelief",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamc",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "amsgrad",
    "amsgradw",
    "asgd",
    "cautious_adamw",
    "cautious_decay_adamw",
    "cautious_lion",
    "dadapt_adam",
    "dog",
    "dynamic_gd",
    "ftrl",
    "gd",
    "lamb",
    "laprop",
    "lars",
    "lion",
    "madgrad",
    "mars",
    "nadam",
    "nadamw",
    "novograd",
    "prodigy",
    "qhadam",
    "radam",
    "radamw",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "sgd",
    "sgdw",
    "signum",
    "sophia_g",
    "stable_adamw",
    "tiger",
    "yogi",
]

# A number, or a schedule: a function of the number of completed steps.
_Number: TypeAlias = SupportsFloat | Callable[[Any], Any]

class _Options(TypedDict, total=False):
    backend: str | None
    threads: int | None
    ema: float | None
    weight_decay_mask: Any
    formats: Any
    copy_to: Any
    seed: int
    reduce: Callable[[Any], None] | None

class _adabelief(Rule):
    """AdaBelief: Adam by the gradients' distance from their mean."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-16,
        weight_decay: _Number = 0.0,
        rectify: bool = True,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _adadelta(Rule):
    """Adadelta: scales the gradient by the ratio of two running root mean squares."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 1.0,
        rho: _Number = 0.9,
        eps: _Number = 1e-06,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _adagrad(Rule):
    """Adagrad: steps by the root of all squares so far."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.01,
        lr_decay: _Number = 0.0,
        weight_decay: _Number = 0.0,
        initial_accumulator_value: _Number = 0.0,
        eps: _Number = 1e-10,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _adam(Rule):
    """Adam; weight decay is added to the gradient, as in torch."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _adamax(Rule):
    """Adamax: Adam by the largest gradient instead of the mean square."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.002,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _adamc(Rule):
    """AdamC: AdamW whose decay falls with the square of the learning rate, so that the
    weights' norms do not grow at the end of a schedule."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.01,
        max_lr: _Number | None = None,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _adamw(Rule):
    """AdamW: Adam, weight decay decoupled."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.01,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _adan(Rule):
    """Adan: Adam with the momentum of the gradients' differences."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.98,
        beta2: _Number = 0.92,
        beta3: _Number = 0.99,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        no_prox: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _ademamix(Rule):
    """AdEMAMix: AdamW with a second, slow momentum."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        beta3: _Number = 0.9999,
        alpha: _Number = 2.0,
        alpha_warmup: _Number = 0.0,
        beta3_warmup: _Number = 0.0,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _adopt(Rule):
    """ADOPT: Adam that divides by the previous second moment, and converges with any
    beta2."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.9999,
        eps: _Number = 1e-06,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _amsgrad(Rule):
    """AMSGrad: Adam over the largest second moment so far."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _amsgradw(Rule):
    """AMSGrad with decoupled weight decay: AdamW under torch's ``amsgrad=True``."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.01,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _asgd(Rule):
    """Averaged SGD: SGD with a falling step; ``eval_params()`` is the mean of all
    points after ``t0``."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.01,
        lambd: _Number = 0.0001,
        alpha: _Number = 0.75,
        t0: _Number = 1000000.0,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _cautious_adamw(Rule):
    """C-AdamW: AdamW that moves only elements whose update and gradient agree in
    sign."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.01,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _cautious_decay_adamw(Rule):
    """AdamW that decays only what its step does not make larger."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.01,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _cautious_lion(Rule):
    """C-Lion: Lion that moves only elements whose update and gradient agree in sign."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.0001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.99,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _dadapt_adam(Rule):
    """D-Adapted Adam: Adam that finds its own learning rate; leave ``lr`` at 1."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 1.0,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        d0: _Number = 1e-06,
        use_bias_correction: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _dog(Rule):
    """DoG: SGD whose step is the distance from the start over the gradients' norms;
    leave ``lr`` at 1."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 1.0,
        reps_rel: _Number = 1e-06,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _dynamic_gd(Rule):
    """GD whose learning rate falls as 1 / (1 + sqrt(completed steps))."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _ftrl(Rule):
    """FTRL-proximal: parameters that stay exactly zero under ``l1``."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        l1: _Number = 0.0,
        l2: _Number = 0.0,
        l2_shrinkage: _Number = 0.0,
        beta: _Number = 0.0,
        initial_accumulator_value: _Number = 0.1,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _gd(Rule):
    """GD: gradient descent."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _lamb(Rule):
    """LAMB: Adam's step in proportion to each array's norm."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-06,
        weight_decay: _Number = 0.01,
        always_adapt: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _laprop(Rule):
    """LaProp: the momentum of normalised gradients."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.0004,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-15,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _lars(Rule):
    """LARS: SGD with momentum in proportion to each array's norm."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 1.0,
        momentum: _Number = 0.9,
        weight_decay: _Number = 0.0005,
        trust_coeff: _Number = 0.001,
        eps: _Number = 1e-08,
        always_adapt: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _lion(Rule):
    """Lion: the sign of a mixture of momentum and gradient."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.0001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.99,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _madgrad(Rule):
    """MADGRAD: dual averaging by the cube root of the squares, with momentum."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.01,
        momentum: _Number = 0.9,
        eps: _Number = 1e-06,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _mars(Rule):
    """MARS-AdamW: AdamW on gradients of less variance."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.003,
        beta1: _Number = 0.95,
        beta2: _Number = 0.99,
        gamma: _Number = 0.025,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _nadam(Rule):
    """NAdam: Adam with Nesterov's momentum, warmed up."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.002,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        momentum_decay: _Number = 0.004,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _nadamw(Rule):
    """NAdamW: NAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.002,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.01,
        momentum_decay: _Number = 0.004,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _novograd(Rule):
    """NovoGrad: momentum of gradients normalised array by array, with one number for
    each array's second moment."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.95,
        beta2: _Number = 0.98,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        grad_averaging: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _prodigy(Rule):
    """Prodigy: Adam that finds its own learning rate; leave ``lr`` at 1."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 1.0,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        d0: _Number = 1e-06,
        d_coef: _Number = 1.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _qhadam(Rule):
    """QHAdam: Adam whose moments are mixed with the gradient itself."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        nu1: _Number = 1.0,
        nu2: _Number = 1.0,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _radam(Rule):
    """RAdam: Adam, rectified while its second moment is uncertain; before that,
    momentum."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _radamw(Rule):
    """RAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.01,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _rmsprop(Rule):
    """RMSprop."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.01,
        alpha: _Number = 0.99,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        momentum: _Number = 0.0,
        centered: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _rprop(Rule):
    """Rprop: only the gradients' signs count, and each parameter has its step."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.01,
        eta_minus: _Number = 0.5,
        eta_plus: _Number = 1.2,
        step_min: _Number = 1e-06,
        step_max: _Number = 50.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _schedule_free_adamw(Rule):
    """Schedule-free AdamW: needs no schedule and no known number of steps."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.0025,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        warmup_steps: _Number = 0.0,
        r: _Number = 0.0,
        weight_lr_power: _Number = 2.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _schedule_free_radam(Rule):
    """Schedule-free RAdam: needs no schedule, no warmup and no known number of
    steps."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.0025,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        weight_decay: _Number = 0.0,
        r: _Number = 0.0,
        weight_lr_power: _Number = 2.0,
        silent_sgd_phase: bool = True,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _schedule_free_sgd(Rule):
    """Schedule-free SGD: needs no schedule and no known number of steps."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 1.0,
        momentum: _Number = 0.9,
        weight_decay: _Number = 0.0,
        warmup_steps: _Number = 0.0,
        r: _Number = 0.0,
        weight_lr_power: _Number = 2.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _sgd(Rule):
    """SGD with momentum."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        momentum: _Number = 0.0,
        dampening: _Number = 0.0,
        weight_decay: _Number = 0.0,
        nesterov: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _sgdw(Rule):
    """SGD with momentum, weight decay decoupled."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        momentum: _Number = 0.0,
        dampening: _Number = 0.0,
        weight_decay: _Number = 0.01,
        nesterov: bool = False,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _signum(Rule):
    """Signum: the sign of the momentum."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta: _Number = 0.9,
        weight_decay: _Number = 0.0,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _sophia_g(Rule):
    """Sophia-G: momentum by a clipped estimate of the Hessian's diagonal."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.0001,
        beta1: _Number = 0.965,
        beta2: _Number = 0.99,
        rho: _Number = 0.04,
        bs: _Number = 5120.0,
        weight_decay: _Number = 0.1,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _stable_adamw(Rule):
    """StableAdamW: AdamW whose learning rate is clipped, array by array, by how
    surprising the gradients are."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta1: _Number = 0.9,
        beta2: _Number = 0.99,
        eps: _Number = 1e-06,
        weight_decay: _Number = 0.01,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _tiger(Rule):
    """Tiger: the sign of the momentum, with defaults that train large models on one
    state buffer."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.001,
        beta: _Number = 0.965,
        weight_decay: _Number = 0.01,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

class _yogi(Rule):
    """Yogi: Adam whose second moment moves by a bounded amount."""

    def __call__(  # type: ignore[override]
        self,
        params: Any,
        *,
        lr: _Number = 0.01,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 0.001,
        weight_decay: _Number = 0.0,
        initial_accumulator_value: _Number = 1e-06,
        **options: Unpack[_Options],
    ) -> Optimizer: ...

gd: _gd
dynamic_gd: _dynamic_gd
sgd: _sgd
sgdw: _sgdw
signum: _signum
tiger: _tiger
lion: _lion
qhadam: _qhadam
rmsprop: _rmsprop
adagrad: _adagrad
adadelta: _adadelta
rprop: _rprop
asgd: _asgd
adam: _adam
amsgrad: _amsgrad
adamw: _adamw
amsgradw: _amsgradw
adamax: _adamax
nadam: _nadam
nadamw: _nadamw
radam: _radam
radamw: _radamw
adabelief: _adabelief
yogi: _yogi
laprop: _laprop
adopt: _adopt
adan: _adan
ademamix: _ademamix
madgrad: _madgrad
ftrl: _ftrl
sophia_g: _sophia_g
adamc: _adamc
cautious_decay_adamw: _cautious_decay_adamw
schedule_free_sgd: _schedule_free_sgd
schedule_free_adamw: _schedule_free_adamw
schedule_free_radam: _schedule_free_radam
lars: _lars
lamb: _lamb
novograd: _novograd
stable_adamw: _stable_adamw
cautious_adamw: _cautious_adamw
cautious_lion: _cautious_lion
mars: _mars
dog: _dog
dadapt_adam: _dadapt_adam
prodigy: _prodigy

RULES: tuple[Rule, ...]
CLASS_RULES: tuple[Rule, ...]
