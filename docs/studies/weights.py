"""Who gets weight, or how much loss there is? The weights of four methods on AT and on TRADES, taken apart.

Published weights u are not of mean one, so they change two things at once: u = mean(u) * (u / mean(u)). The rows are

    at_vir              u / mean(u): which examples count, and nothing else
    at_vir_mean         mean(u) for every example: how large the loss is, and nothing else
    at_vir_published    u: both (of MAIL: 3u, as in its code)

and the same with mail, wmmr and weat, and with trades. Two further controls: AT at a tenth of the rate, which VIR's
smaller loss is like (`at_slow`), and TRADES at 1.7 * 5, below which VIR's beta never falls (`trades_beta`).

One grid for each base; rows may be added later, in the same folder:

    robustmail trials docs/studies/weights.py:{at,at_vir,at_vir_mean,at_vir_published} --seeds 0:3 \\
        --baseline weights.py:at --out trials/weights-at
"""

from robustmail import (
    AT,
    PGD,
    SGD,
    TRADES,
    Affine,
    Exp,
    MeanOf,
    Recipe,
    Sigmoid,
    Softplus,
    Stairs,
    cifar10,
    energy,
    pm_adv,
    subset,
    timm_model,
    vulnerability,
)

BUDGET = {"eps": 8 / 255, "alpha": 3 / 255, "steps": 5}
MAIL_AT = {"slope": 10.0, "bias": -0.5}
MAIL_TRADES = {"slope": 2.0, "bias": 0.0}
VIR_AT = {"alpha": 7.0, "bias": 0.007}
VIR_TRADES = {"alpha": 8.0, "bias": 1.7}

at = Recipe(
    data=subset(cifar10(validation=250), train=5250),
    model=timm_model("small_cnn", width=16),
    attack=PGD(**BUDGET),
    objective=AT(),
    epochs=10,
    batch=64,
    optimizer=SGD(lr=Stairs({0: 0.05, 6: 0.005, 9: 0.0005}), momentum=0.9, weight_decay=5e-4),
    select="last",
    validate="nat",
    evaluate=("nat", "pgd20", "apgd-t"),
    test_size=1000,
)
trades = at.but(attack=PGD(**BUDGET, loss="kl", start="gaussian"), objective=TRADES(beta=5.0))
trades_both = trades.but(objective=TRADES(beta=6.0, weigh="both", anchor="adv"))  # what WEAT weighs

at_slow = at.but(optimizer=SGD(lr=Stairs({0: 0.005, 6: 0.0005, 9: 0.00005}), momentum=0.9, weight_decay=5e-4))
trades_beta = trades.but(objective=TRADES(beta=8.5))


def parts(method: Recipe, margin, weighter, **settings) -> tuple[Recipe, Recipe, Recipe]:
    """The method with (weights of mean one, their mean for every example, the weights as published)."""
    published = weighter(**{"normalize": False, **settings})
    weighters = (weighter(**{**settings, "normalize": True, "scale": 1.0}), MeanOf(weighter=published), published)
    one, mean, both = (method.but(margin=margin, weighter=w) for w in weighters)
    return one, mean, both


at_mail, at_mail_mean, at_mail_published = parts(at.but(burn_in=6), pm_adv, Sigmoid, **MAIL_AT, scale=3.0)
at_wmmr, at_wmmr_mean, at_wmmr_published = parts(at, pm_adv, Exp, alpha=0.5)
at_vir, at_vir_mean, at_vir_published = parts(at, vulnerability(gamma=10.0), Affine, **VIR_AT)
at_weat, at_weat_mean, at_weat_published = parts(at, energy, Softplus)

trades_mail, trades_mail_mean, trades_mail_published = parts(
    trades.but(burn_in=6), pm_adv, Sigmoid, **MAIL_TRADES, scale=3.0
)
trades_wmmr, trades_wmmr_mean, trades_wmmr_published = parts(trades, pm_adv, Exp, alpha=2.0)
trades_vir, trades_vir_mean, trades_vir_published = parts(trades, vulnerability(gamma=3.0), Affine, **VIR_TRADES)
trades_weat, trades_weat_mean, trades_weat_published = parts(trades_both, energy, Softplus)
