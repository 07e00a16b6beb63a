"""Streaming metrics on numpy arrays that merge across ranks.

Every metric is fed with `update(predictions, labels, features)` batch by batch, gives its value with
`compute()`, and takes in what another rank has seen with `merge(other.state())`. A metric over no
rows is `nan` (`[]` for the confusion matrix); nothing here warns.
"""

from __future__ import annotations

from propeller.metrics.base import Metric, check_names, compute_all
from propeller.metrics.counts import F1, MCC, Acc, ClassCounts, ConfusionMatrix, MacroF1, Precision, Recall
from propeller.metrics.moments import Mean, Pearson
from propeller.metrics.multi_label import ExactMatch, MicroF1, MultiLabelMacroF1
from propeller.metrics.ranking import Ranking, Retrieval
from propeller.metrics.ranks import AUC, Spearman

__all__ = [
    "AUC",
    "Acc",
    "ClassCounts",
    "ConfusionMatrix",
    "ExactMatch",
    "F1",
    "MCC",
    "MacroF1",
    "Mean",
    "Metric",
    "MicroF1",
    "MultiLabelMacroF1",
    "Pearson",
    "Precision",
    "Ranking",
    "Recall",
    "Retrieval",
    "Spearman",
    "check_names",
    "compute_all",
]
