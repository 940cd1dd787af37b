"""Which ingredients help, at a scale that two CPU cores carry: a narrow ResNet-18 and 5,000 real images of CIFAR-10.

    robustmail trials docs/studies/ingredients.py:{at,at_ema,at_swa,at_smoothing,at_idbh,at_all} --seeds 0:3 \\
        --baseline ingredients.py:at --out trials/ingredients-at

and the same with mail_trades instead of at. `ema` and `swa` are averages of one and the same run, which `select` tells
apart, so the first three rows are trained once. AT has the attack of at_fast_benchmark with five steps instead of ten.
"""

from robustmail import AT, IDBH, PGD, SGD, TRADES, Recipe, Sigmoid, Stairs, cifar10, pm_adv, subset

BUDGET = {"eps": 8 / 255, "alpha": 3 / 255, "steps": 5}

at = Recipe(
    data=subset(cifar10(validation=500), train=5500),
    model="cifar_resnet18_w8",
    attack=PGD(**BUDGET),
    objective=AT(),
    epochs=12,
    batch=64,
    optimizer=SGD(lr=Stairs({0: 0.02, 9: 0.002, 11: 0.0002}), momentum=0.9, weight_decay=5e-4),
    ema=0.99,
    swa=9,
    select="best-live",
    validate="pgd10",
    evaluate=("nat", "pgd20", "cw"),
    test_size=1000,
)
at_ema = at.but(select="best-ema")
at_swa = at.but(select="best-swa")
at_smoothing = at.but(label_smoothing=0.2)
at_idbh = at.but(augment=IDBH("weak"))
at_all = at.but(label_smoothing=0.2, augment=IDBH("weak"), select="best-ema")

mail_trades = at.but(
    attack=PGD(**BUDGET, loss="kl", start="gaussian"),
    objective=TRADES(beta=5.0),
    margin=pm_adv,
    weighter=Sigmoid(slope=2.0, bias=0.0),
    burn_in=9,
)
mail_trades_ema = mail_trades.but(select="best-ema")
mail_trades_swa = mail_trades.but(select="best-swa")
mail_trades_smoothing = mail_trades.but(label_smoothing=0.2)
mail_trades_idbh = mail_trades.but(augment=IDBH("weak"))
mail_trades_all = mail_trades.but(label_smoothing=0.2, augment=IDBH("weak"), select="best-ema")
