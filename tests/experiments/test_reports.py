"""What reports draw and say whatever the study: every seed, and code as code."""

from matplotlib.figure import Figure

from smearlens.experiments.smeared_keys.report import draw_kernels as draw_profiles
from smearlens.experiments.smeared_keys.short_report import draw_kernels
from smearlens.experiments.state_space.mamba_report import draw_rules

SEEDS = range(10)  # three more than there are colours


def looks(lines):
    return {(line.get_color(), line.get_linestyle()) for line in lines}


def test_every_seed_has_a_kernel_profile_of_its_own_look():
    def kernel(seed):
        rows = [{"lag": lag, "rms": 0.1 * lag + 0.01 * seed} for lag in range(3)]
        records = [{**row, "low": row["rms"], "high": row["rms"]} for row in rows]
        return {"records": records, "null_rms": 0.3, "null_high": 0.4}

    runs = [
        {"task": "repeats", "name": "conv k=3", "seed": seed, "smearing": {"kernel": kernel(seed)}}
        for seed in SEEDS
    ]
    figure = Figure()
    draw_kernels(figure, {"measures": runs})
    (ax,) = figure.axes
    lines = [container.lines[0] for container in ax.containers]
    assert [list(line.get_ydata())[1] for line in lines] == [0.1 + 0.01 * seed for seed in SEEDS]
    assert len(looks(lines)) == 10
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        f"seed {seed}" for seed in SEEDS
    ]


def test_every_seed_has_a_line_over_the_discretisations():
    runs = [
        {"name": name, "seed": seed, "accuracy": 0.5 + 0.01 * seed, "negative_decays": 0.0}
        for name in ("kernel 4", "kernel 4, zoh")
        for seed in SEEDS
    ]
    figure = Figure()
    draw_rules(figure, {"measures": runs})
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == [f"seed {seed}" for seed in SEEDS]
    assert len(looks(lines)) == 10


def test_the_average_over_channels_is_drawn_at_every_tap():
    names = ("conv k=3", "conv k=5", "conv k=5, same padding", "conv k=5 on K")
    runs = []
    for index, name in enumerate(names):
        lags = [-2, -1, 0, 1, 2] if "same" in name else list(range(3 if index == 0 else 5))
        for seed in range(3):
            kernel = {
                "lags": lags, "rms": [0.5] * len(lags), "null_rms": 0.3, "null_high": 0.4,
                "signed_mean": [0.1 * lag + 0.01 * seed for lag in lags], "null_signed": 0.07,
            }  # fmt: skip
            runs.append({"task": "repeats", "name": name, "seed": seed, "kernel": kernel})
    figure = Figure()
    draw_profiles(figure, {"measures": runs})
    average = figure.axes[4 + names.index("conv k=5, same padding")]
    (line,) = [container.lines[0] for container in average.containers]
    assert list(line.get_xdata()) == [-2, -1, 0, 1, 2]
    assert [round(y, 6) for y in line.get_ydata()] == [-0.19, -0.09, 0.01, 0.11, 0.21]
