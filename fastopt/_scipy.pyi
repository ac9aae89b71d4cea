# Made by docs/make.py from the rules.

from fastopt.scipy import Method

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

gd: Method
dynamic_gd: Method
sgd: Method
sgdw: Method
signum: Method
tiger: Method
lion: Method
qhadam: Method
rmsprop: Method
adagrad: Method
adadelta: Method
rprop: Method
asgd: Method
adam: Method
amsgrad: Method
adamw: Method
amsgradw: Method
adamax: Method
nadam: Method
nadamw: Method
radam: Method
radamw: Method
adabelief: Method
yogi: Method
laprop: Method
adopt: Method
adan: Method
ademamix: Method
madgrad: Method
ftrl: Method
sophia_g: Method
adamc: Method
cautious_decay_adamw: Method
schedule_free_sgd: Method
schedule_free_adamw: Method
schedule_free_radam: Method
lars: Method
lamb: Method
novograd: Method
stable_adamw: Method
cautious_adamw: Method
cautious_lion: Method
mars: Method
dog: Method
dadapt_adam: Method
prodigy: Method
