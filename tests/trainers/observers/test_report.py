import json
import re
from html.parser import HTMLParser

import pytest

from trainwright.trainers.observers.report import EVENTS, Report, layout_words, render, write_report
from trainwright.trainers.observers.run_record import RunRecord, read_run

CONFIG = """
run: {name: my-run}
train: {steps: 600}
parallel: {dp_replicate: 1, dp_shard: -1, tp: 2, sp: null, pp: 1, ep: 1, zero: 3, engine: fsdp2}
versions: {torch: 2.13.0}
"""


def line(step, **more):
    values = {"step": step, "tokens": step * 2048, "loss": 8 - step / 100, "lr": 1e-3, "grad_norm": 1.0}
    return {**values, "param_norm": 80.0, "tokens_per_s": 5000.0, "step_time_s": 0.4, "memory_gib": 1.5, **more}


def event(name, second=0, **fields):
    return {"time": f"2026-01-02T03:{second // 60:02d}:{second % 60:02d}.000Z", "event": name, **fields}


@pytest.fixture
def page(tmp_path):
    """Write a run's files and give the page made of them."""

    def written(config=None, metrics=(), events=(), goodput=None):
        if config is not None:
            (tmp_path / "config.yaml").write_text(config)
        for name, records in (("metrics", metrics), ("events", events)):
            if records:
                text = "".join(json.dumps(record) + "\n" for record in records)
                (tmp_path / f"{name}.jsonl").write_text(text)
        if goodput is not None:
            (tmp_path / "goodput.json").write_text(json.dumps(goodput))
        return write_report(tmp_path).read_text()

    return written


@pytest.fixture
def whole(page):
    """The page of a run with everything in it."""
    metrics = [line(step, **({"val_loss": 3.25} if step == 600 else {})) for step in range(1, 601)]
    events = [
        event("start", device="a fine CPU", parameters=5_904_640, world_size=8),
        event("unigram", nats=6.214),
        event("checkpoint", 40, step=100, path="checkpoints/step_00000100"),
        event("spike", 50, step=150),
        event("resume", 60, step=100),
        event("sample", 240, prompt="def f():", text="def f():\n    pass"),
        event("stop", 250, step=600, reason="done"),
    ]
    return page(CONFIG, metrics, events, {"productive": 200.0, "down": 50.0})


class Outline(HTMLParser):
    """The elements of a page, its text, and the figures' names and values."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "line", "path", "rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def figures(page):
    plain = re.sub(r" <small>.*?</small>", "", page)
    return dict(re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", plain))


def test_the_key_figures(whole):
    assert figures(whole) == {
        "Steps": "600",
        "Tokens": "1.229 M",
        "Final loss": "2.0000",
        "Validation loss": "3.2500",
        "Throughput": "5,000",
        "Wall time": "4m10s",
        "Productive": "80.00 %",
        "Parameters": "5.905 M",
        "Device": "a fine CPU",
        "Layout": "dp_shard 4 × tp 2",
    }


def test_the_page_is_whole_and_stands_alone(whole):
    outline = Outline(whole)
    assert outline.open == []
    assert not {"link", "img", "iframe", "base"} & set(outline.tags)
    assert not [value for name, value in outline.attributes if name in ("src", "href", "onclick")]
    without_namespace = whole.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|@import|url\(", without_namespace)
    assert "prefers-color-scheme: dark" in whole


def test_each_part_is_there(whole):
    text = " ".join(Outline(whole).text)
    for part in ("my-run", "Done", "Loss", "Gradient norm", "Parameter norm", "Learning rate", "Throughput"):
        assert part in text
    for part in ("Memory", "unigram entropy 6.214", "productive 80.0%", "the matrices of each layer", "2.13.0"):
        assert part in text
    assert '<span class="prompt">def f():</span>\n    pass</pre>' in whole
    for mark in ("checkpoint at step 100", "spike at step 150", "resume at step 100", "stop at step 600"):
        assert f"<title>{mark}</title>" in whole


def test_the_script_gets_the_points_of_each_plot(whole):
    data = json.loads(re.search(r'id="data">(.*?)</script>', whole).group(1))
    assert len(data) == whole.count('class="area"') == 7
    assert data[0]["curves"][0]["values"][-1] == 2.0
    assert data[0]["curves"][2] == {"style": "second", "steps": [600], "values": [3.25]}
    keys = [figure.count("<b></b>") for figure in whole.split("<figure>")[1:]]
    assert keys == [len(plot["curves"]) for plot in data]


def test_all_text_is_escaped(page):
    evil = '</script><script>alert("x")</script><b onclick=1>'
    yaml = json.dumps({"run": {"name": evil}, "parallel": {evil: evil}, "versions": {evil: evil}})
    html = page(
        yaml,
        [line(1), line(2)],
        [
            event("start", device=evil),
            event("sample", prompt=evil, text=evil + evil),
            event(evil, step=1, path=evil),
            event("stop", reason=evil),
        ],
        {evil: 3.0},
    )
    outline = Outline(html)
    assert outline.tags.count("script") == 2
    assert outline.tags.count("b") == html.count("<b></b>") + 1
    assert "onclick" not in dict(outline.attributes)
    assert html.count("<script") == html.count("</script") == 2
    assert "".join(outline.text).count(evil) > 10


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([event("start"), event("stop", reason="done")], '<b class="good">Done</b> at step 2'),
        ([event("start"), event("stop", reason="SIGTERM")], '<b class="bad">Stopped: SIGTERM</b> at step 2'),
        ([event("stop", reason="SIGTERM"), event("resume", step=1)], '<b class="">Not finished</b> at step 2'),
        ([], '<b class="">Not finished</b> at step 2'),
    ],
)
def test_the_outcome(events, outcome, page):
    assert outcome in page(metrics=[line(1), line(2)], events=events)


def test_an_empty_folder_has_a_page(page, tmp_path):
    html = page()
    assert tmp_path.name in html
    assert "No steps yet" in html
    assert Outline(html).open == []


@pytest.mark.parametrize("config", ["", "a: [", "- 1\n- 2", "run: null\nparallel: 3\ntrain: []", "a: ${b}"])
def test_a_broken_configuration_leaves_its_parts_out(config, page):
    assert "Done" in page(config, [line(1)], [event("stop", reason="done")])


def test_broken_lines_and_values_are_passed_over(tmp_path, page):
    (tmp_path / "goodput.json").write_text("{")
    metrics = [line(1), {"loss": 3}, line(2, loss="high", grad_norm=None), line(3)]
    events = [{"event": "start"}, {"time": "soon", "event": "checkpoint", "step": "x"}, {"time": 3}]
    html = page("", metrics, events)
    assert "at step 3" in html


def test_a_step_that_is_not_finite_is_a_gap_and_a_mark(page):
    html = page(metrics=[line(1), line(2, loss=None, grad_norm=None), line(3)])
    assert "<title>not finite at step 2</title>" in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html).group(1))
    assert data[0]["curves"][0]["values"] == [7.99, None, 7.97]


def test_a_long_run_stays_small_and_keeps_its_spike(page, tmp_path):
    metrics = (line(step, loss=3 + step % 7 / 10, grad_norm=1 + step % 5) for step in range(1, 30_001))
    metrics = [{**record, "loss": 99.0} if record["step"] == 12_345 else record for record in metrics]
    events = [event("checkpoint", step=step) for step in range(5, 30_000, 5)]
    html = page(CONFIG, metrics, events)
    assert len(html) < 500_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', html).group(1))
    assert all(len(curve["steps"]) <= 1500 for plot in data for curve in plot["curves"])
    raw = data[0]["curves"][0]
    assert dict(zip(raw["steps"], raw["values"], strict=True))[12_345] == 99.0
    assert html.count("<tr>") < EVENTS + 50


def test_events_of_an_earlier_run_in_the_folder_are_not_this_run(tmp_path, page):
    page(
        metrics=[line(1)],
        events=[
            event("start", 0, step=0),
            event("stop", 10, reason="SIGTERM"),
            event("start", 20, step=0),
            event("checkpoint", 30, step=1),
            event("start", 40),
            event("resume", 40, step=1),
            event("start", 50, step=1),
        ],
    )
    run = read_run(tmp_path)
    assert [each["time"][17:19] for each in run.events] == ["20", "30", "40", "40", "50"]
    assert run.seconds == 30


def test_a_validation_after_the_last_step_is_on_the_curve(tmp_path, page):
    page(metrics=[line(1), line(2, val_loss=4.0), line(3)], events=[event("validation", step=3, val_loss=3.5)])
    steps, values = read_run(tmp_path).column("val_loss")
    assert (steps.tolist(), values.tolist()) == ([2, 3], [4.0, 3.5])


def test_the_lengths_of_spikes_are_counted_each_once(page):
    lengths = [1, 1, 2, 5, 8, 9, 33, 400]
    events = [event("spike", step=10 * i, length=length, height=3.0) for i, length in enumerate(lengths)]
    html = page(metrics=[line(step) for step in range(1, 101)], events=[*events, events[0]])
    figure = re.search('<svg class="bars".*?</svg>', html).group()
    names = re.findall(r'dy="20">(.*?)<', figure)
    heights = [float(height) for height in re.findall(r'height="([\d.]+)%"', figure)]
    assert dict(zip(names, heights, strict=True)) == {
        "1": 100.0,
        "2": 50.0,
        "3": 0.0,
        "4": 0.0,
        "5 to 8": 100.0,
        "9 to 16": 50.0,
        "17 to 32": 0.0,
        "over 32": 100.0,
    }
    assert re.findall(r'dy="-6">(.*?)<', figure) == ["2", "1", "2", "1", "2"]
    assert "8 in all" in html
    assert Outline(html).open == []


def test_spikes_on_either_side_of_a_rollback_are_two_and_one_without_a_height_is_none(page):
    spike = event("spike", step=8, length=1, height=3.0)
    broken = [event("spike", step=9, length=1, height=height) for height in (None, float("inf"))]
    restart, rollback = event("resume", step=5), event("rollback", step=8, began=8)
    html = page(metrics=[line(9)], events=[spike, restart, spike, rollback, restart, spike, *broken])
    assert "2 in all" in html


def test_a_run_that_was_rolled_back_to_its_beginning_keeps_its_spikes(tmp_path, page):
    events = [event("start"), event("spike", step=1, length=1), event("rollback", step=1, began=1)]
    html = page(metrics=[line(1)], events=[*events, event("start")])
    assert len(read_run(tmp_path).events) == 4
    assert '<g class="mark resume"><title>rollback at step 1</title>' in html


def test_the_device_is_also_found_among_the_versions(page):
    html = page("platform: auto\nversions: {device: a finer CPU}", [line(1)], [event("start", parameters=5)])
    assert (figures(html)["Device"], figures(html)["Parameters"]) == ("a finer CPU", "5")


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        ({}, None, None),
        ({"dp_shard": -1, "tp": 1}, 1, "one rank"),
        ({"dp_shard": -1, "tp": 1}, None, "dp_shard over all ranks"),
        (
            {"dp_replicate": 2, "dp_shard": -1, "tp": 4, "pp": 2},
            64,
            "dp_replicate 2 × dp_shard 4 × tp 4 × pp 2",
        ),
    ],
)
def test_the_layout_in_words(parallel, ranks, words):
    start = {"event": "start", "world_size": ranks}
    assert layout_words(RunRecord("", {"parallel": parallel}, "", {}, [start], {})) == words


def test_the_page_is_a_function_of_the_folder(tmp_path, whole):
    assert render(read_run(tmp_path)) == render(read_run(tmp_path)) == whole
    assert not list(tmp_path.glob("*.new"))


def test_the_observer_writes_at_the_stop_and_once_a_minute(tmp_path, drive, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    written = []
    monkeypatch.setattr(
        "trainwright.trainers.observers.report.write_report", lambda folder: written.append(now[0])
    )
    report = Report(tmp_path)
    for second in range(0, 150, 10):
        now[0] = float(second)
        report.on_step(None, {})
    assert written == [60.0, 120.0]
    report.on_stop(None, "done")
    assert len(written) == 3


def test_a_page_that_takes_long_is_written_less_often(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slow(folder):
        now[0] += 5

    monkeypatch.setattr("trainwright.trainers.observers.report.write_report", slow)
    report = Report(tmp_path)
    now[0] = 60.0
    report.on_step(None, {})
    assert report.due == 60 + 5 + 500


def test_a_page_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def broken(folder):
        raise ZeroDivisionError

    monkeypatch.setattr("trainwright.trainers.observers.report.write_report", broken)
    Report(tmp_path).on_stop(None, "done")
    assert "report.html could not be written" in caplog.text
