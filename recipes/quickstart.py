"""MAIL-TRADES on 1,797 handwritten digits that come with scikit-learn: a minute on two CPU cores, no network needed.

robustmail run recipes/quickstart.py
robustmail run quickstart weighter.slope=5 --out runs/steeper
"""

from robustmail import SGD, TRADES, Recipe, Sigmoid, Stairs, digits, pm_adv, torchattack

recipe = Recipe(
    data=digits(),
    model="small_cnn",
    attack=torchattack("TPGD", eps=0.1, alpha=0.025, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # pull the two predictions together,
    margin=pm_adv,  # and pull hardest
    weighter=Sigmoid(slope=2.0, bias=0.0),  # where the true class leads least
    burn_in=10,
    epochs=20,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.05, 14: 0.01, 18: 0.001}), momentum=0.9, weight_decay=5e-4),
    evaluate=("nat", "pgd100", "cw", "apgd"),
)
