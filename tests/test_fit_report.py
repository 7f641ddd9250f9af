"""The report of `fit` for someone who reads only the terminal: which head, how sure, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from gaussians import gaussian_features, take, write_store

from featcache.cli import main
from featcache.commands.embed import embed
from featcache.commands.fit import fit
from featcache.evaluate.compete import Competition, Contender
from featcache.evaluate.metrics import score
from featcache.evaluate.report import score_lines
from featcache.evaluate.select import Candidate
from featcache.fitting import Files, FitResult, Wishes, fit_features, outlook
from featcache.fitting.advice import advise
from featcache.fitting.summary import summarise
from featcache.progress import LogProgress
from featcache.store.features import FeatureSet

TOY = "channel_mean:channel_mean"


def run(features: FeatureSet, head: str = "ridge", **options: Any) -> FitResult:
    return fit_features(features, Wishes(head=head, **{"curve": False, **options}))[0]


@pytest.fixture(scope="module")
def plain() -> FitResult:
    return run(gaussian_features({"train": 90, "test": 200}, gap=2))


def contender(head: str, simplicity: int, behind: float, se: float, *, chosen: bool = False) -> Contender:
    best = Candidate(values={}, nll=0.5 + behind, nll_se=0.1, accuracy=0.8, accuracy_se=0.01, temperature=1.0)
    return Contender(
        head=head, simplicity=simplicity, best=best, behind=behind, behind_se=se, ahead=0.0, ahead_se=0.0,
        chosen=chosen, seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("contenders", "words"),
    [
        (
            [("ncm", 1, 0.3, 0.1, False), ("ridge", 3, 0.005, 0.008, True), ("logistic", 4, 0.0, 0.0, False)],
            "tied in cross-validation with logistic, and simpler",
        ),
        (
            [("ridge", 3, 0, 0, True), ("logistic", 4, 0.01, 0.02, False), ("knn", 6, 0.005, 0.02, False)],
            "tied in cross-validation with knn and logistic, though ahead",
        ),
        (
            [("ridge", 3, 0, 0, True), ("logistic", 4, 0.014, 0.01, False), ("knn", 6, 0.021, 0.046, False)],
            "tied in cross-validation with knn, though ahead",
        ),
        (
            [("ncm", 1, 0, 0, True), ("ridge", 3, 0.0003, 0.0001, False), ("knn", 6, 0.02, 0.05, False)],
            "tied in cross-validation with ridge and knn, though ahead",
        ),
        (
            [("ncm", 1, 0.3, 0.1, False), ("ridge", 3, 0.0, 0.0, True)],
            "surely better in cross-validation than ncm, the runner-up, by 3.0 standard errors of log-loss",
        ),
        (
            [("ncm", 1, 0.15, 0.1, False), ("ridge", 3, 0.0, 0.0, True), ("knn", 6, 0.9, 0.1, False)],
            "probably, not surely, better in cross-validation than ncm, the runner-up, by 1.5 standard",
        ),
        ([("ridge", 3, 0.0, 0.0, True)], "no other head took part"),
        ([], "heads could not be compared"),
    ],
)
def test_the_first_sentence_says_how_sure_the_choice_of_the_head_is(
    plain: FitResult, contenders: list[Any], words: str
) -> None:
    field = tuple(
        contender(head, simplicity, behind, se, chosen=chosen)
        for head, simplicity, behind, se, chosen in contenders
    )
    competition = Competition(contenders=field, left_out=(), weighted=False)
    assert words in summarise(replace(plain, competition=competition))


def test_few_rows_make_no_head_surely_better(plain: FitResult) -> None:
    field = (contender("ncm", 1, 0.3, 0.1), contender("ridge", 3, 0.0, 0.0, chosen=True))
    result = replace(plain, competition=Competition(contenders=field, left_out=(), weighted=False))
    assert result.cross_validated is not None
    few, enough = (
        summarise(replace(result, cross_validated=replace(result.cross_validated, n_units=n)))
        for n in (49, 50)
    )
    assert few.endswith(
        "; ahead in cross-validation of ncm, the runner-up; 49 rows held out are too few to be sure"
    )
    assert "surely better" in enough


def test_the_report_begins_with_the_head_its_nodes_and_its_score(plain: FitResult) -> None:
    first, second, *_ = plain.describe().splitlines()
    m = plain.metrics
    low, high = (f"{100 * end:.1f}" for end in m.accuracy_ci95)
    assert first == (
        f"ridge on penultimate: {100 * m.accuracy:.1f} % right (95 % interval {low} to {high}) on 200 rows "
        "(test); no other head was compared with it"
    )
    assert second == ""
    many = summarise(replace(plain, nodes=("a", "b", "c", "d")))
    assert many.startswith("ridge on 4 nodes: ")


@pytest.mark.parametrize(
    "words", ["(the temperature divides its scores", "(log-loss is 0 where", "± is one standard error"]
)
def test_terms_are_explained_where_they_appear(plain: FitResult, words: str) -> None:
    assert words in plain.describe()


def test_rows_of_classes_that_were_not_trained_on_are_said_at_the_top_and_beside_the_log_loss() -> None:
    features = gaussian_features({"train": 60, "test": 30})
    some = take(features, (features.splits == "test") | (features.y != 2))
    result = run(some)
    assert result.untrained == ("class2",)
    assert "; 10 of them of classes that were not trained on, and so wrong; " in summarise(result)
    m = result.metrics
    assert m.no_chance == 10
    by_hand = run(take(some, some.y != 2)).metrics.nll
    assert m.nll_of_others == pytest.approx(by_hand, rel=1e-6)
    assert m.nll == pytest.approx((10 * -np.log(1e-15) + 20 * by_hand) / 30)
    (line,) = [line for line in result.describe().splitlines() if line.startswith("  log-loss")]
    given = "with 10 rows whose true class was given practically no probability"
    assert f"{given}, such as of classes not trained on; " in line
    assert f"; {by_hand:.4f} without them" in line
    whole = run(features)
    assert (whole.metrics.no_chance, whole.untrained) == (0, ())
    assert whole.metrics.nll_of_others == whole.metrics.nll


def test_a_confident_miss_is_not_put_down_to_a_class_that_was_not_trained_on() -> None:
    said = np.array([[1.0, 0.0], [1.0, 0.0], [0.2, 0.8]])
    missed = score(np.array([0, 1, 1]), said, ("cat", "dog"))
    (line,) = [line for line in score_lines(missed, on="test") if line.startswith("  log-loss")]
    given = ", with 1 row whose true class was given practically no probability"
    assert line.endswith(f"{given}; {-np.log(0.8) / 2:.4f} without it")
    (line,) = [line for line in score_lines(missed, on="test", untrained=True) if "log-loss  " in line]
    assert "no probability, such as of classes not trained on; " in line


def test_classes_that_were_not_trained_on_come_first_and_are_no_sign_of_the_fit() -> None:
    features = gaussian_features({"train": 300, "test": 300}, gap=3)
    whole = run(features)
    result = run(take(features, (features.splits == "test") | (features.y != 2)))
    advice = advise(result)
    assert advice.why.startswith("add labelled images of class2 to the training rows: 100 of the 300 rows")
    assert "After adding labelled images" in advice.why
    assert require_pasteable(advice.command) == ["embed", "fit"]
    assert result.verdict is None
    assert result.to_json()["verdict"] is None
    assert "worse than expected" not in result.describe()
    assert "fits: " not in result.describe()
    assert "fits: " in whole.describe()


def commands(line: str) -> Iterator[tuple[str, list[str]]]:
    for part in line.split(" && "):
        program, verb, *words = shlex.split(part)
        assert program == "featcache"
        yield verb, words


def parse(verb: str, words: list[str]) -> dict[str, Any]:
    """The options of a command, which are refused where there is no such one."""
    whole = click.Context(main, **main.context_settings)
    return main.commands[verb].make_context(verb, words, parent=whole).params


def require_pasteable(line: str) -> list[str]:
    """The verbs of the commands, whose options there are."""
    for verb, words in commands(line):
        parse(verb, words)
    return [verb for verb, _ in commands(line)]


def spread(plain: FitResult, accuracy: float, train_accuracy: float, **changes: Any) -> FitResult:
    """With this accuracy on 10,000 rows."""
    low, high = accuracy - 0.005, accuracy + 0.005
    m = replace(plain.metrics, n=10_000, accuracy=accuracy, accuracy_ci95=(low, high))
    held = replace(m, accuracy=accuracy)
    changes = {"cross_validated": held, **changes}
    return replace(plain, metrics=m, train_accuracy=train_accuracy, **changes)


FILES = Files(
    store="my photos.h5", model="out/m.model", data="photos", images="photos",
    embed=("featcache", "embed", "photos", "-o", "my photos.h5", "--backbone", "resnet18"),
)  # fmt: skip


def test_what_to_do_next_is_a_command_that_can_be_pasted(plain: FitResult) -> None:
    result = replace(plain, files=FILES)
    good = advise(spread(result, 0.99, 1.0))
    assert good.command == "featcache predict out/m.model photos"
    labels = advise(spread(result, 0.8, 1.0))
    assert labels.command == (
        "featcache embed photos -o 'my photos.h5' --backbone resnet18 && "
        "featcache fit 'my photos.h5' --head ridge -o out/m.model"
    )
    unsure = advise(spread(result, 0.966, 0.99))
    assert unsure.why.startswith("score more rows, which are too few to tell")
    assert unsure.command == labels.command
    wide = replace(result, metrics=replace(result.metrics, accuracy_ci95=(0.5, 0.9)))
    for one in (labels, unsure, advise(wide)):  # it does nothing while there are no more images
        assert "After adding labelled images to those that were embedded, the command takes them" in one.why
    assert "After adding" not in good.why
    nodes = advise(spread(result, 0.8, 0.8, other_nodes=("a", "b")))
    assert nodes.command == "featcache fit 'my photos.h5' --head ridge --nodes auto -o out/m.nodes.model"
    tune = advise(spread(result, 0.8, 0.8))
    assert tune.command == "featcache finetune out/m.model photos -o out/m.tuned.model"
    knn = advise(spread(replace(result, head="knn", asked="auto"), 0.8, 0.8))
    assert knn.command == (
        "featcache fit 'my photos.h5' --head logistic -o out/m.linear.model && "
        "featcache finetune out/m.linear.model photos -o out/m.tuned.model"
    )
    worse = spread(result, 0.8, 1.0)
    worse = replace(worse, cross_validated=replace(worse.metrics, accuracy=0.95, accuracy_ci95=(0.94, 0.96)))
    near = advise(worse)
    assert near.command == (
        "featcache fit 'my photos.h5' --head ridge --group-by similar -o out/m.grouped.model"
    )
    rows = advise(replace(worse, grouped_by="folder"))
    assert rows.command == "featcache evaluate out/m.model 'my photos.h5' --csv out/m.csv"
    own = advise(spread(replace(result, files=replace(FILES, own_code="mine:net")), 0.99, 1.0))
    for advice in (good, labels, nodes, tune, knn, near, rows, own):
        require_pasteable(advice.command)


def test_names_of_nodes_and_groups_are_asked_for_again(plain: FitResult) -> None:
    several = replace(plain, files=FILES, nodes=("a", "b c"), other_nodes=("d",), grouped_by="folder:2")
    assert " --group-by folder:2 --nodes auto " in advise(spread(several, 0.8, 1.0)).command
    all_of_them = spread(replace(several, other_nodes=()), 0.8, 1.0)
    assert " --node a --node 'b c' --group-by folder:2 " in advise(all_of_them).command


def test_the_commands_fit_again_as_was_asked_for(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5", gaussian_features({"train": 60, "test": 30}))
    asked: dict[str, Any] = {
        "class_weight": "balanced", "logit_adjustment": 0.5, "precision": 0.9, "budget": 7.5, "shots": (1, 2),
        "tries": 3, "device": "cpu", "seed": 4, "curve": False, "group_by": "similar:0.999",
    }  # fmt: skip
    result = fit(store, head="logistic", params={"C": 0.25, "max_iter": "500"}, check=False, **asked)
    short = replace(result, metrics=replace(result.metrics, accuracy_ci95=(0.5, 0.9)))
    (_, (verb, words)) = commands(advise(replace(short, cross_validated=None)).command)
    again = parse(verb, words)
    assert {name: again[name] for name in asked} == asked
    assert (again["head"], again["params"]) == ("logistic", ("C=0.25", "max_iter=500"))
    knn = advise(spread(replace(result, head="knn"), 0.8, 0.8))
    ((_, words), _) = commands(knn.command)
    linear = parse("fit", words)
    assert {name: linear[name] for name in asked} == asked
    assert (linear["head"], linear["params"]) == ("logistic", ())  # those of knn are not of logistic


def test_few_rows_ask_for_more_of_them() -> None:
    result = run(gaussian_features({"train": 60, "test": 12}))
    advice = advise(result)
    assert advice.why.startswith("score more rows than 12")
    assert require_pasteable(advice.command) == ["embed", "fit"]


def test_a_threshold_comes_with_the_command_that_uses_it() -> None:
    result = replace(
        run(gaussian_features({"train": 240, "test": 120}, gap=1.5), precision=0.85), files=FILES
    )
    assert result.abstention is not None
    assert result.abstention.test is not None
    threshold = result.abstention.threshold
    line = f"  featcache predict out/m.model photos --abstain-below {threshold}"
    assert line in result.describe().splitlines()
    assert len(str(threshold)) <= 6
    require_pasteable(line)
    confidence = result.held_out.probabilities.max(axis=1)
    assert result.abstention.test.accepted == (confidence >= float(str(threshold))).sum()


def test_a_wish_that_nothing_could_be_held_out_for_is_noted() -> None:
    result = run(gaussian_features({"train": 6, "test": 6}, k=6), precision=0.9)
    assert result.abstention is None
    assert "no threshold for a precision of 0.9: no row could be held out to choose it by" in result.notes


def test_the_commands_name_what_the_store_was_made_of(
    tmp_path: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        save_image(Path(f"photos/{'ab'[i % 2]}/{i}.png"), seed=i)
    embed("photos", "s.h5", backbone=TOY)
    result = fit("s.h5", head="ncm")
    assert result.files.data == result.files.images == "photos"
    assert result.files.own_code == TOY
    verb, words = next(commands(shlex.join(result.files.embed)))
    again = parse(verb, words)
    assert (again["data"], again["output"], again["backbones"]) == (Path("photos"), "s.h5", (TOY,))
    *_, command = result.describe().splitlines()
    require_pasteable(command.strip())
    unsaid = fit(write_store(tmp_path / "t.h5", gaussian_features()), head="ncm")
    assert unsaid.files.data == "DATA"
    require_pasteable(unsaid.describe().splitlines()[-1].strip())


def test_the_curve_is_drawn_where_the_budget_leaves_time(monkeypatch: pytest.MonkeyPatch) -> None:
    features = gaussian_features({"train": 90, "test": 60})
    late = run(features, curve=None, budget=1e-9)
    assert late.outlook.curve is None
    assert (
        "no accuracy by training rows: nothing is left of the 1e-09 s of --budget; --curve asks for it all "
        "the same"
    ) in late.notes
    assert run(features, curve=True, budget=1e-9).outlook.curve is not None
    assert run(features, curve=None).outlook.curve is not None


def test_parts_are_fitted_while_all_of_them_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a row: after 10 rows of 70 in all, 70 seconds are to be expected."""
    now = [0.0]
    monkeypatch.setattr(outlook, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def fit_rows(kept: Any) -> Any:
        now[0] += len(kept) * (len(kept) < 80)
        return kept

    for seconds, fits in ((69.0, 1), (71.0, 3)):
        pace = outlook._Pace(whole=80, parts=70, seconds=seconds)
        pace.keep(np.arange(80), fit_rows)  # of all rows, which is there already
        for n in (10, 20, 40)[:fits]:
            pace.keep(np.arange(n), fit_rows)
        if fits < 3:
            with pytest.raises(outlook._TooSlow, match="it would take about 70 s, longer than the 69 s left"):
                pace.keep(np.arange(20), fit_rows)


def test_rows_of_classes_that_were_not_trained_on_are_in_no_outlook() -> None:
    features = gaussian_features({"train": 120, "test": 60}, gap=3)
    some = take(features, (features.splits == "test") | (features.y != 2))
    result, known = run(some, shots=(2,), curve=True), run(take(some, some.y != 2), shots=(2,), curve=True)
    assert result.outlook.shots == known.outlook.shots
    assert result.outlook.curve == known.outlook.curve
    assert result.outlook.curve is not None
    assert result.outlook.curve.points[-1].accuracy == known.metrics.accuracy > result.metrics.accuracy
    said = "accuracy by fewer labelled images is of the 40 rows scored whose class was trained on"
    assert said in result.notes
    assert said not in known.notes
    alone = run(take(some, (some.splits != "test") | (some.y == 2)), shots=(2,), curve=True)
    assert (alone.outlook.shots, alone.outlook.curve) == ((), None)
    assert alone.notes[-1].endswith("no row scored is of a class that was trained on")


def test_a_quick_fit_says_nothing_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    for head in ("auto", "ridge", "ncm"):
        fit_features(gaussian_features({"train": 90, "test": 60}), Wishes(head=head), progress=LogProgress())
    assert capsys.readouterr().err == ""
