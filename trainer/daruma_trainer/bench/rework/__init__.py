"""What a failure costs in iterations, for each way to save and to recover: `daruma bench rework`.

`problems` and its kin are the mathematics; `arena` is the real code of servers, saves and restores
without processes, `replicas` that of streams to replicas; `trial` is one training run with its
failures; `stats`, `page` and `plots` make the tables; `perturbation` is the study of the bound.
"""
