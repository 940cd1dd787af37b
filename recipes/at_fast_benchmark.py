"""PGD-AT as the public FastAT benchmark trains it, so that a run can be compared with its table.

fzjcdt/FastAT_Benchmark, CIFAR-10, ResNet-18, three seeds: 44.3 % under AutoAttack as here, 82.36 % natural and 50.49
% with the average of the weights (`:wa`). Its settings: 100 epochs of 49,000 images, batches of 128, one-cycle rate
up to 0.1, weight decay 5e-4, label smoothing 0.4, average 0.9995. It does not say where its cycle peaks: torch's
default, 30 %, here.

    robustmail run at_fast_benchmark
    robustmail run at_fast_benchmark:wa                            with the average, as its PGD-AT-WA
"""

from robustmail import AT, SGD, OneCycle, Recipe, cifar10, torchattack

recipe = Recipe(
    data=cifar10(validation=1000),
    model="cifar_resnet18",
    label_smoothing=0.4,
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=AT(),  # and learn it
    epochs=100,
    batch=128,
    optimizer=SGD(lr=OneCycle(high=0.1, peak=30, epochs=100), momentum=0.9, weight_decay=5e-4),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

wa = recipe.but(ema=0.9995)
