"""All margins on three small networks: AT, TRADES and MAIL-AT, a narrow ResNet-18 and 2,500 real images of CIFAR-10.

    robustmail run docs/studies/margins.py:at
    robustmail margins runs/margins-at/0 --n 1000

and the same with trades and mail_at instead of at. The plain recipe is that of ingredients.py.
"""

from robustmail import AT, PGD, SGD, TRADES, Recipe, Sigmoid, Stairs, cifar10, pm_adv, subset

BUDGET = {"eps": 8 / 255, "alpha": 3 / 255, "steps": 5}

at = Recipe(
    data=subset(cifar10(validation=250), train=2750),
    model="cifar_resnet18_w8",
    attack=PGD(**BUDGET),
    objective=AT(),
    epochs=8,
    batch=64,
    optimizer=SGD(lr=Stairs({0: 0.05, 5: 0.005, 7: 0.0005}), momentum=0.9, weight_decay=5e-4),
    select="last",
    validate="nat",
    evaluate=("nat", "pgd20", "cw"),
    test_size=1000,
)
trades = at.but(attack=PGD(**BUDGET, loss="kl", start="gaussian"), objective=TRADES(beta=5.0))
mail_at = at.but(margin=pm_adv, weighter=Sigmoid(slope=10.0, bias=-0.5), burn_in=5)
