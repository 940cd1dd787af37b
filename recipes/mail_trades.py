"""MAIL-TRADES: TRADES that works hardest where the probabilistic margin is small.

Wang et al., "Probabilistic Margins for Instance Reweighting in Adversarial Training", NeurIPS 2021.

    robustmail run mail_trades
    robustmail run mail_trades weighter.slope=5 seed=2
    robustmail run mail_trades margin=pm_nat --out runs/mail_trades_pm_nat  a row of Table 1
    robustmail run mail_trades:wrn                                          the paper's WRN-32-10 (Table 3)
    robustmail run mail_trades:code                                         the authors' released code

Read as in the paper: weights of mean one, eps 8/255, 74 epochs of burn-in, 100 epochs. The KL goes from the natural
to the adversarial prediction, as in all code (Eq. 10 prints it the other way round: objective.reverse=True), and the
attack maximises it (before April 2022 the authors' code attacked the cross-entropy: "attack=PGD(start='gaussian')").
"""

from robustmail import SGD, TRADES, Recipe, Sigmoid, Stairs, cifar10, pm_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # pull the two predictions together,
    margin=pm_adv,  # and pull hardest
    weighter=Sigmoid(slope=2.0, bias=0.0),  # where the true class leads least
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

wrn = recipe.but(
    model="cifar_wrn32_10",
    optimizer=SGD(lr=Stairs({0: 0.1, 74: 0.01, 89: 0.001}), momentum=0.9, weight_decay=7e-4),
)

code = recipe.but(
    attack=torchattack("TPGD", eps=0.031, alpha=0.007, steps=10),
    weighter=Sigmoid(slope=2.0, bias=0.0, normalize=False, scale=3.0),
    burn_in=76,
    epochs=120,
    optimizer=SGD(lr=Stairs({0: 0.01, 75: 0.001, 90: 0.0001, 100: 0.00001}), momentum=0.9, weight_decay=3.5e-3),
    select="last",
)
