"""Histograms as Prometheus reads them."""

from daruma_trainer.histogram import Histogram


def test_a_value_counts_in_every_bucket_that_it_does_not_exceed() -> None:
    found = Histogram((0, 1, 2.5))
    for value in (0, 1, 1.5, 2.5, 7):
        found.observe(value)
    assert (found.count, found.total) == (5, 12.0)
    family = found.family("name", "What it is.", {"job": "j"})
    assert (family.type, family.documentation) == ("histogram", "What it is.")
    got = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    assert all(s.labels["job"] == "j" for s in family.samples)
    assert got == {
        ("name_bucket", "0.0"): 1,
        ("name_bucket", "1.0"): 2,
        ("name_bucket", "2.5"): 4,
        ("name_bucket", "+Inf"): 5,
        ("name_count", None): 5,
        ("name_sum", None): 12.0,
    }
