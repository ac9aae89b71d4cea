# Made by docs/make.py from the rules.

from typing import Any

from fastopt.keras import Optimizer
from fastopt.rules import _Number

__all__: list[str] = [
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

class adabelief(Optimizer):
    """AdaBelief: Adam by the gradients' distance from their mean."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-16,
        rectify: bool = True,
        **options: Any,
    ) -> None: ...

class adadelta(Optimizer):
    """Adadelta: scales the gradient by the ratio of two running root mean squares."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        rho: _Number = 0.9,
        eps: _Number = 1e-06,
        **options: Any,
    ) -> None: ...

class adagrad(Optimizer):
    """Adagrad: steps by the root of all squares so far."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        lr_decay: _Number = 0.0,
        initial_accumulator_value: _Number = 0.0,
        eps: _Number = 1e-10,
        **options: Any,
    ) -> None: ...

class adam(Optimizer):
    """Adam; weight decay is added to the gradient, as in torch."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class adamax(Optimizer):
    """Adamax: Adam by the largest gradient instead of the mean square."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class adamc(Optimizer):
    """AdamC: AdamW whose decay falls with the square of the learning rate, so that the
    weights' norms do not grow at the end of a schedule."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        max_lr: _Number | None = None,
        **options: Any,
    ) -> None: ...

class adamw(Optimizer):
    """AdamW: Adam, weight decay decoupled."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class adan(Optimizer):
    """Adan: Adam with the momentum of the gradients' differences."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.98,
        beta2: _Number = 0.92,
        beta3: _Number = 0.99,
        eps: _Number = 1e-08,
        no_prox: bool = False,
        **options: Any,
    ) -> None: ...

class ademamix(Optimizer):
    """AdEMAMix: AdamW with a second, slow momentum."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        beta3: _Number = 0.9999,
        alpha: _Number = 2.0,
        alpha_warmup: _Number = 0.0,
        beta3_warmup: _Number = 0.0,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class adopt(Optimizer):
    """ADOPT: Adam that divides by the previous second moment, and converges with any
    beta2."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.9999,
        eps: _Number = 1e-06,
        **options: Any,
    ) -> None: ...

class amsgrad(Optimizer):
    """AMSGrad: Adam over the largest second moment so far."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class amsgradw(Optimizer):
    """AMSGrad with decoupled weight decay: AdamW under torch's ``amsgrad=True``."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class asgd(Optimizer):
    """Averaged SGD: SGD with a falling step; ``eval_params()`` is the mean of all
    points after ``t0``."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        lambd: _Number = 0.0001,
        alpha: _Number = 0.75,
        t0: _Number = 1000000.0,
        **options: Any,
    ) -> None: ...

class cautious_adamw(Optimizer):
    """C-AdamW: AdamW that moves only elements whose update and gradient agree in
    sign."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class cautious_decay_adamw(Optimizer):
    """AdamW that decays only what its step does not make larger."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class cautious_lion(Optimizer):
    """C-Lion: Lion that moves only elements whose update and gradient agree in sign."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.99,
        **options: Any,
    ) -> None: ...

class dadapt_adam(Optimizer):
    """D-Adapted Adam: Adam that finds its own learning rate; leave ``lr`` at 1."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        d0: _Number = 1e-06,
        use_bias_correction: bool = False,
        **options: Any,
    ) -> None: ...

class dog(Optimizer):
    """DoG: SGD whose step is the distance from the start over the gradients' norms;
    leave ``lr`` at 1."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        reps_rel: _Number = 1e-06,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class dynamic_gd(Optimizer):
    """GD whose learning rate falls as 1 / (1 + sqrt(completed steps))."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None: ...

class ftrl(Optimizer):
    """FTRL-proximal: parameters that stay exactly zero under ``l1``."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        l1: _Number = 0.0,
        l2: _Number = 0.0,
        l2_shrinkage: _Number = 0.0,
        beta: _Number = 0.0,
        initial_accumulator_value: _Number = 0.1,
        **options: Any,
    ) -> None: ...

class gd(Optimizer):
    """GD: gradient descent."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None: ...

class lamb(Optimizer):
    """LAMB: Adam's step in proportion to each array's norm."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-06,
        always_adapt: bool = False,
        **options: Any,
    ) -> None: ...

class laprop(Optimizer):
    """LaProp: the momentum of normalised gradients."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-15,
        **options: Any,
    ) -> None: ...

class lars(Optimizer):
    """LARS: SGD with momentum in proportion to each array's norm."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        momentum: _Number = 0.9,
        trust_coeff: _Number = 0.001,
        eps: _Number = 1e-08,
        always_adapt: bool = False,
        **options: Any,
    ) -> None: ...

class lion(Optimizer):
    """Lion: the sign of a mixture of momentum and gradient."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.99,
        **options: Any,
    ) -> None: ...

class madgrad(Optimizer):
    """MADGRAD: dual averaging by the cube root of the squares, with momentum."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        momentum: _Number = 0.9,
        eps: _Number = 1e-06,
        **options: Any,
    ) -> None: ...

class mars(Optimizer):
    """MARS-AdamW: AdamW on gradients of less variance."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.95,
        beta2: _Number = 0.99,
        gamma: _Number = 0.025,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class nadam(Optimizer):
    """NAdam: Adam with Nesterov's momentum, warmed up."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        momentum_decay: _Number = 0.004,
        **options: Any,
    ) -> None: ...

class nadamw(Optimizer):
    """NAdamW: NAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        momentum_decay: _Number = 0.004,
        **options: Any,
    ) -> None: ...

class novograd(Optimizer):
    """NovoGrad: momentum of gradients normalised array by array, with one number for
    each array's second moment."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.95,
        beta2: _Number = 0.98,
        eps: _Number = 1e-08,
        grad_averaging: bool = False,
        **options: Any,
    ) -> None: ...

class prodigy(Optimizer):
    """Prodigy: Adam that finds its own learning rate; leave ``lr`` at 1."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        d0: _Number = 1e-06,
        d_coef: _Number = 1.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        **options: Any,
    ) -> None: ...

class qhadam(Optimizer):
    """QHAdam: Adam whose moments are mixed with the gradient itself."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        nu1: _Number = 1.0,
        nu2: _Number = 1.0,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class radam(Optimizer):
    """RAdam: Adam, rectified while its second moment is uncertain; before that,
    momentum."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class radamw(Optimizer):
    """RAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        **options: Any,
    ) -> None: ...

class rmsprop(Optimizer):
    """RMSprop."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        alpha: _Number = 0.99,
        eps: _Number = 1e-08,
        momentum: _Number = 0.0,
        centered: bool = False,
        **options: Any,
    ) -> None: ...

class rprop(Optimizer):
    """Rprop: only the gradients' signs count, and each parameter has its step."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        eta_minus: _Number = 0.5,
        eta_plus: _Number = 1.2,
        step_min: _Number = 1e-06,
        step_max: _Number = 50.0,
        **options: Any,
    ) -> None: ...

class schedule_free_adamw(Optimizer):
    """Schedule-free AdamW: needs no schedule and no known number of steps."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        warmup_steps: _Number = 0.0,
        r: _Number = 0.0,
        weight_lr_power: _Number = 2.0,
        **options: Any,
    ) -> None: ...

class schedule_free_radam(Optimizer):
    """Schedule-free RAdam: needs no schedule, no warmup and no known number of
    steps."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 1e-08,
        r: _Number = 0.0,
        weight_lr_power: _Number = 2.0,
        silent_sgd_phase: bool = True,
        **options: Any,
    ) -> None: ...

class schedule_free_sgd(Optimizer):
    """Schedule-free SGD: needs no schedule and no known number of steps."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        momentum: _Number = 0.9,
        warmup_steps: _Number = 0.0,
        r: _Number = 0.0,
        weight_lr_power: _Number = 2.0,
        **options: Any,
    ) -> None: ...

class sgd(Optimizer):
    """SGD with momentum."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        momentum: _Number = 0.0,
        dampening: _Number = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None: ...

class sgdw(Optimizer):
    """SGD with momentum, weight decay decoupled."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        momentum: _Number = 0.0,
        dampening: _Number = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None: ...

class signum(Optimizer):
    """Signum: the sign of the momentum."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta: _Number = 0.9,
        **options: Any,
    ) -> None: ...

class sophia_g(Optimizer):
    """Sophia-G: momentum by a clipped estimate of the Hessian's diagonal."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.965,
        beta2: _Number = 0.99,
        rho: _Number = 0.04,
        bs: _Number = 5120.0,
        **options: Any,
    ) -> None: ...

class stable_adamw(Optimizer):
    """StableAdamW: AdamW whose learning rate is clipped, array by array, by how
    surprising the gradients are."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.99,
        eps: _Number = 1e-06,
        **options: Any,
    ) -> None: ...

class tiger(Optimizer):
    """Tiger: the sign of the momentum, with defaults that train large models on one
    state buffer."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta: _Number = 0.965,
        **options: Any,
    ) -> None: ...

class yogi(Optimizer):
    """Yogi: Adam whose second moment moves by a bounded amount."""

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        *,
        beta1: _Number = 0.9,
        beta2: _Number = 0.999,
        eps: _Number = 0.001,
        initial_accumulator_value: _Number = 1e-06,
        **options: Any,
    ) -> None: ...
