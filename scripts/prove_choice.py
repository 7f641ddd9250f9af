"""The default of `fit` beside an exhaustive search with scikit-learn: which head, how good on the test rows.

    python scripts/prove_choice.py FEATURES.h5 [--per-decade 4 --lowest -4 --highest 0]

scikit-learn's LogisticRegression is fitted on all training rows, standardised, at every C of the grid, and
each is scored on the test rows: the best of these was chosen on them, so it is the highest bar of a single C.
featcache chooses by cross-validation on the training rows and is scored once.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from featcache.fitting import Wishes, choose_rows, fit_features
from featcache.store.reader import FeatureStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--per-decade", type=int, default=4)
    parser.add_argument("--lowest", type=float, default=-4)
    parser.add_argument("--highest", type=float, default=0)
    parser.add_argument("--tol", type=float, default=1e-4, help="of scikit-learn's lbfgs")
    parser.add_argument("--budget", type=float, default=60)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    features = FeatureStore.open(options.store).features()
    rows = choose_rows(features)
    scaler = StandardScaler()
    train, test = scaler.fit_transform(features.X[rows.train]), scaler.transform(features.X[rows.test])
    y = features.y
    steps = round((options.highest - options.lowest) * options.per_decade) + 1
    best = 0.0
    for C in np.logspace(options.lowest, options.highest, steps):
        begun = time.perf_counter()
        model = LogisticRegression(C=C, tol=options.tol, max_iter=2000).fit(train, y[rows.train])
        accuracy = float((model.predict(test) == y[rows.test]).mean())
        best = max(best, accuracy)
        took = time.perf_counter() - begun
        print(f"scikit-learn C = {C:<9.4g} accuracy {accuracy:.4f}  {took:6.1f} s", flush=True)
    result, _ = fit_features(features, Wishes(budget=options.budget, curve=False))
    said = f"{result.head} {dict(result.params)}, {result.seconds:.1f} s"
    print(
        f"featcache    {said}\n             accuracy {result.metrics.accuracy:.4f}; best single C {best:.4f}"
    )


if __name__ == "__main__":
    main()
