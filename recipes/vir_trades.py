"""VIR-TRADES: TRADES that pulls hardest on unsure examples whose prediction the attack moves.

Fakorede et al., TMLR 2023, in the setting of the MAIL paper; w = 1.7 + 8 exp(-3 p_y(x)) KL(p(x) || p(x')), as in the
authors' code, whose default beta is 5. Their table has 51.03 % under AutoAttack (ResNet-18, four seeds, second hand)
where their TRADES has 48.32. The weight is never below 1.7, so that the divergence is multiplied by 8.5 at least:
`:control` is TRADES with that beta.

    robustmail run vir_trades
    robustmail run vir_trades:control
"""

from robustmail import SGD, TRADES, Affine, Recipe, Stairs, cifar10, torchattack, vulnerability

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # pull the two predictions together,
    margin=vulnerability(gamma=3.0),  # and pull hardest where the attack moves far
    weighter=Affine(alpha=8.0, bias=1.7, normalize=False),  # what the model is unsure of
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

control = recipe.but(objective=TRADES(beta=8.5), margin=None, weighter=None)
