# Made by docs/make.py from the rules.

from fastopt.jax import Optimizer
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

def adabelief(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-16,
    weight_decay: _Number = 0.0,
    rectify: bool = True,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """AdaBelief: Adam by the gradients' distance from their mean."""

def adadelta(
    *,
    lr: _Number | None = 1.0,
    rho: _Number = 0.9,
    eps: _Number = 1e-06,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Adadelta: scales the gradient by the ratio of two running root mean squares."""

def adagrad(
    *,
    lr: _Number | None = 0.01,
    lr_decay: _Number = 0.0,
    weight_decay: _Number = 0.0,
    initial_accumulator_value: _Number = 0.0,
    eps: _Number = 1e-10,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Adagrad: steps by the root of all squares so far."""

def adam(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Adam; weight decay is added to the gradient, as in torch."""

def adamax(
    *,
    lr: _Number | None = 0.002,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Adamax: Adam by the largest gradient instead of the mean square."""

def adamc(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.01,
    max_lr: _Number | None = None,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """AdamC: AdamW whose decay falls with the square of the learning rate, so that the
    weights' norms do not grow at the end of a schedule."""

def adamw(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.01,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """AdamW: Adam, weight decay decoupled."""

def adan(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.98,
    beta2: _Number = 0.92,
    beta3: _Number = 0.99,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    no_prox: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Adan: Adam with the momentum of the gradients' differences."""

def ademamix(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    beta3: _Number = 0.9999,
    alpha: _Number = 2.0,
    alpha_warmup: _Number = 0.0,
    beta3_warmup: _Number = 0.0,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """AdEMAMix: AdamW with a second, slow momentum."""

def adopt(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.9999,
    eps: _Number = 1e-06,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """ADOPT: Adam that divides by the previous second moment, and converges with any
    beta2."""

def amsgrad(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """AMSGrad: Adam over the largest second moment so far."""

def amsgradw(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.01,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """AMSGrad with decoupled weight decay: AdamW under torch's ``amsgrad=True``."""

def asgd(
    *,
    lr: _Number | None = 0.01,
    lambd: _Number = 0.0001,
    alpha: _Number = 0.75,
    t0: _Number = 1000000.0,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Averaged SGD: SGD with a falling step; ``eval_params()`` is the mean of all
    points after ``t0``."""

def cautious_adamw(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.01,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """C-AdamW: AdamW that moves only elements whose update and gradient agree in
    sign."""

def cautious_decay_adamw(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.01,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """AdamW that decays only what its step does not make larger."""

def cautious_lion(
    *,
    lr: _Number | None = 0.0001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.99,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """C-Lion: Lion that moves only elements whose update and gradient agree in sign."""

def dadapt_adam(
    *,
    lr: _Number | None = 1.0,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    d0: _Number = 1e-06,
    use_bias_correction: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """D-Adapted Adam: Adam that finds its own learning rate; leave ``lr`` at 1."""

def dog(
    *,
    lr: _Number | None = 1.0,
    reps_rel: _Number = 1e-06,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """DoG: SGD whose step is the distance from the start over the gradients' norms;
    leave ``lr`` at 1."""

def dynamic_gd(
    *,
    lr: _Number | None = 0.001,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """GD whose learning rate falls as 1 / (1 + sqrt(completed steps))."""

def ftrl(
    *,
    lr: _Number | None = 0.001,
    l1: _Number = 0.0,
    l2: _Number = 0.0,
    l2_shrinkage: _Number = 0.0,
    beta: _Number = 0.0,
    initial_accumulator_value: _Number = 0.1,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """FTRL-proximal: parameters that stay exactly zero under ``l1``."""

def gd(
    *,
    lr: _Number | None = 0.001,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """GD: gradient descent."""

def lamb(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-06,
    weight_decay: _Number = 0.01,
    always_adapt: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """LAMB: Adam's step in proportion to each array's norm."""

def laprop(
    *,
    lr: _Number | None = 0.0004,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-15,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """LaProp: the momentum of normalised gradients."""

def lars(
    *,
    lr: _Number | None = 1.0,
    momentum: _Number = 0.9,
    weight_decay: _Number = 0.0005,
    trust_coeff: _Number = 0.001,
    eps: _Number = 1e-08,
    always_adapt: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """LARS: SGD with momentum in proportion to each array's norm."""

def lion(
    *,
    lr: _Number | None = 0.0001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.99,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Lion: the sign of a mixture of momentum and gradient."""

def madgrad(
    *,
    lr: _Number | None = 0.01,
    momentum: _Number = 0.9,
    eps: _Number = 1e-06,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """MADGRAD: dual averaging by the cube root of the squares, with momentum."""

def mars(
    *,
    lr: _Number | None = 0.003,
    beta1: _Number = 0.95,
    beta2: _Number = 0.99,
    gamma: _Number = 0.025,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """MARS-AdamW: AdamW on gradients of less variance."""

def nadam(
    *,
    lr: _Number | None = 0.002,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    momentum_decay: _Number = 0.004,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """NAdam: Adam with Nesterov's momentum, warmed up."""

def nadamw(
    *,
    lr: _Number | None = 0.002,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.01,
    momentum_decay: _Number = 0.004,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """NAdamW: NAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``."""

def novograd(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.95,
    beta2: _Number = 0.98,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    grad_averaging: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """NovoGrad: momentum of gradients normalised array by array, with one number for
    each array's second moment."""

def prodigy(
    *,
    lr: _Number | None = 1.0,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    d0: _Number = 1e-06,
    d_coef: _Number = 1.0,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Prodigy: Adam that finds its own learning rate; leave ``lr`` at 1."""

def qhadam(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    nu1: _Number = 1.0,
    nu2: _Number = 1.0,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """QHAdam: Adam whose moments are mixed with the gradient itself."""

def radam(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """RAdam: Adam, rectified while its second moment is uncertain; before that,
    momentum."""

def radamw(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.01,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """RAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``."""

def rmsprop(
    *,
    lr: _Number | None = 0.01,
    alpha: _Number = 0.99,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    momentum: _Number = 0.0,
    centered: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """RMSprop."""

def rprop(
    *,
    lr: _Number | None = 0.01,
    eta_minus: _Number = 0.5,
    eta_plus: _Number = 1.2,
    step_min: _Number = 1e-06,
    step_max: _Number = 50.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Rprop: only the gradients' signs count, and each parameter has its step."""

def schedule_free_adamw(
    *,
    lr: _Number | None = 0.0025,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    warmup_steps: _Number = 0.0,
    r: _Number = 0.0,
    weight_lr_power: _Number = 2.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Schedule-free AdamW: needs no schedule and no known number of steps."""

def schedule_free_radam(
    *,
    lr: _Number | None = 0.0025,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 1e-08,
    weight_decay: _Number = 0.0,
    r: _Number = 0.0,
    weight_lr_power: _Number = 2.0,
    silent_sgd_phase: bool = True,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Schedule-free RAdam: needs no schedule, no warmup and no known number of
    steps."""

def schedule_free_sgd(
    *,
    lr: _Number | None = 1.0,
    momentum: _Number = 0.9,
    weight_decay: _Number = 0.0,
    warmup_steps: _Number = 0.0,
    r: _Number = 0.0,
    weight_lr_power: _Number = 2.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Schedule-free SGD: needs no schedule and no known number of steps."""

def sgd(
    *,
    lr: _Number | None = 0.001,
    momentum: _Number = 0.0,
    dampening: _Number = 0.0,
    weight_decay: _Number = 0.0,
    nesterov: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """SGD with momentum."""

def sgdw(
    *,
    lr: _Number | None = 0.001,
    momentum: _Number = 0.0,
    dampening: _Number = 0.0,
    weight_decay: _Number = 0.01,
    nesterov: bool = False,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """SGD with momentum, weight decay decoupled."""

def signum(
    *,
    lr: _Number | None = 0.001,
    beta: _Number = 0.9,
    weight_decay: _Number = 0.0,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Signum: the sign of the momentum."""

def sophia_g(
    *,
    lr: _Number | None = 0.0001,
    beta1: _Number = 0.965,
    beta2: _Number = 0.99,
    rho: _Number = 0.04,
    bs: _Number = 5120.0,
    weight_decay: _Number = 0.1,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Sophia-G: momentum by a clipped estimate of the Hessian's diagonal."""

def stable_adamw(
    *,
    lr: _Number | None = 0.001,
    beta1: _Number = 0.9,
    beta2: _Number = 0.99,
    eps: _Number = 1e-06,
    weight_decay: _Number = 0.01,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """StableAdamW: AdamW whose learning rate is clipped, array by array, by how
    surprising the gradients are."""

def tiger(
    *,
    lr: _Number | None = 0.001,
    beta: _Number = 0.965,
    weight_decay: _Number = 0.01,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Tiger: the sign of the momentum, with defaults that train large models on one
    state buffer."""

def yogi(
    *,
    lr: _Number | None = 0.01,
    beta1: _Number = 0.9,
    beta2: _Number = 0.999,
    eps: _Number = 0.001,
    weight_decay: _Number = 0.0,
    initial_accumulator_value: _Number = 1e-06,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Optimizer:
    """Yogi: Adam whose second moment moves by a bounded amount."""
