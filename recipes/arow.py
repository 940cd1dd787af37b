"""ARoW: TRADES whose divergence counts where the adversarial prediction is wrong, with label smoothing.

Yang et al., "Improving Adversarial Robustness by Putting More Regularizations on Less Robust Samples", ICML 2023;
numbers of the authors' code: beta 6 (their `lamb`, twice the paper's lambda), smoothing 0.2, SWA from epoch 51 of
120, rate 0.1 that falls tenfold at 60 and 100. The gradient runs through the factor 1 - p_y(x'); `:detached` has it
as a weight, which the gradient does not see (1.12 times smaller). `:cow` is their Confidence-weighted form, with the
factor p_y(x).

    robustmail run arow
    robustmail run arow:swa                 with their SWA from epoch 51 on
    robustmail run arow:detached
    robustmail run arow:cow
"""

from robustmail import SGD, TRADES, Affine, ARoW, Recipe, Stairs, cifar10, p_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=ARoW(beta=6.0),  # pull the two predictions together where the model is wrong under attack
    label_smoothing=0.2,
    epochs=120,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.1, 60: 0.01, 100: 0.001}), momentum=0.9, weight_decay=5e-4),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

swa = recipe.but(swa=50, select="last-swa")

detached = recipe.but(
    objective=TRADES(beta=6.0),
    margin=p_adv,
    weighter=Affine(alpha=1.0, bias=1.0, normalize=False),  # 1 - p_y(x')
)

cow = recipe.but(objective=ARoW(beta=6.0, anti=True))
