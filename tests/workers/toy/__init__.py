"""A kind of analysis that is added to a copy of the tree, in the files that docs/architecture.md lists.

`scaling` multiplies the weight of the classification head by each of several factors, and evaluates the network.
"""

from pathlib import Path

HERE = Path(__file__).parent
# By file: an anchor text that occurs once, and the text inserted before it.
INSERTED = {
    "app/schemas/base.py": [('"series"]\n', '"scaling", ')],
    "app/schemas/requests.py": [
        (
            "AnalysisRequest = Annotated[",
            """class ScalingOptions(EvaluationOptions):
    factors: list[Number] = Field(min_length=1, max_length=100)


class ScalingRequest(Strict):
    kind: Literal["scaling"]
    checkpoint_id: Id
    probe_id: Id
    options: ScalingOptions


""",
        ),
        ('SeriesRequest, Field(discriminator="kind")', "ScalingRequest | "),
    ],
    "app/schemas/reports.py": [
        (
            "Report = Annotated[",
            """from app.schemas.requests import ScalingOptions


class ScalingPoint(Strict):
    factor: FiniteFloat
    splits: dict[SplitName, SplitEvaluation]


class ScalingReport(_Report):
    kind: Literal["scaling"]
    subject: Subject
    provenance: Provenance[ScalingOptions]
    points: list[ScalingPoint]


""",
        ),
        ('SeriesReport, Field(discriminator="kind")', "ScalingReport | "),
    ],
    "app/schemas/kinds.py": [
        (
            '    "series": KindOfAnalysis(',
            '    "scaling": KindOfAnalysis(ScalingReport, _OF_MODEL, place="factor", axis="factor"),\n',
        ),
        (
            "_OF_MODEL = (",
            "from app.schemas.reports import ScalingReport\n\n",
        ),
    ],
    "workers/tasks.py": [
        (
            "WholeStep = ",
            """from app.schemas.reports import ScalingPoint
from app.schemas.requests import ScalingOptions


class ScalingTask(PointsTask):
    options: ScalingOptions

    def place_name(self) -> str:
        return "factor"

    def places(self) -> list[float]:
        return self.options.factors


class ScalingAnswer(Answer):
    point: ScalingPoint


class ScalingPointTask(ScalingTask, AtPlace):
    step: Literal["scaling.point"] = "scaling.point"
    first: Known | None = None


class ScalingReportTask(ScalingTask):
    step: Literal["scaling.report"] = "scaling.report"
    points: tuple[ScalingAnswer, ...]


""",
        ),
        ("SeriesPointTask\nReportStep", "ScalingPointTask | "),
        ("SeriesReportTask\nAnyStep", "ScalingReportTask | "),
        ('    "series": SeriesTask,', '    "scaling": ScalingTask,\n'),
        (
            "    SeriesTask: _Steps(",
            "    ScalingTask: _Steps(ScalingPointTask, ScalingReportTask, ScalingAnswer),\n",
        ),
    ],
    "workers/compute/kinds/__init__.py": [
        ("def compute(", "from workers.compute.kinds import scaling\nfrom workers.tasks import *\n\n\n"),
        (
            "        case SeriesReportTask():",
            "        case ScalingReportTask():\n            return scaling.scaling_report(step, context)\n",
        ),
        (
            "            case SeriesPointTask():\n                return series.series_point",
            "            case ScalingPointTask():\n                return scaling.scaling_point(step, context)\n",
        ),
    ],
}
ADDED = {"workers/compute/kinds/scaling.py": HERE / "scaling.txt"}


def add_to(tree: Path) -> None:
    """Add the kind to a copy of the tree."""
    for name, insertions in INSERTED.items():
        path = tree / name
        text = path.read_text()
        for anchor, inserted in insertions:
            assert text.count(anchor) == 1, (name, anchor)
            text = text.replace(anchor, inserted + anchor)
        path.write_text(text)
    for name, source in ADDED.items():
        (tree / name).write_text(source.read_text())
