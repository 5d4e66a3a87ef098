"""A TEST DOUBLE of a Determined master and its one agent, on loopback.

It is no master: no database, no users, no scheduler, no containers, one trial at a
time, and only the calls that the tests make. What is real: the client's messages are
parsed by, and the answers built from, the types of determined.common.api.bindings of
the installed package; and each trial runs, as a process of determined_agent.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import determined as det
import yaml
from determined.common import api
from determined.common.api import bindings
from determined_agent import kill_tree, run_trial

TOKEN = "token-of-the-test-double"
USER = bindings.v1User(active=True, admin=False, username="determined")
WORKSPACES = {"tutorial": ("detection",)}
NOW = datetime.now(timezone.utc).isoformat()
AUTH, TASK_AUTH = api.Session.AUTH_HEADER, api.TaskSession.AUTH_HEADER
ExperimentState, TrialState = bindings.experimentv1State, bindings.trialv1State


@dataclass
class Trial:
    id: int
    experiment: Experiment
    hparams: dict
    state: TrialState = TrialState.ACTIVE
    runs: int = 0
    acknowledged: bool = False  # that the present run ends because of preemption
    progress: float = 0.0
    statuses: list[str] = field(default_factory=list)
    metrics: list[tuple[str, int, dict]] = field(default_factory=list)
    checkpoints: list[bindings.v1Checkpoint] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    process: subprocess.Popen | None = None

    def reported(self, group: str) -> dict[int, dict]:
        """{steps: metrics} of "training" or "validation"."""
        return {steps: values for kind, steps, values in self.metrics if kind == group}

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.logs)

    def typed(self) -> bindings.trialv1Trial:
        return bindings.trialv1Trial(
            experimentId=self.experiment.id,
            hparams=self.hparams,
            id=self.id,
            restarts=0,
            startTime=NOW,
            state=self.state,
            totalBatchesProcessed=max(self.reported("training"), default=0),
        )


@dataclass
class Experiment:
    id: int
    config: dict
    files: list[bindings.v1File]
    state: ExperimentState = ExperimentState.ACTIVE
    trials: list[Trial] = field(default_factory=list)

    @property
    def paused(self) -> bool:
        return self.state == ExperimentState.PAUSED

    def typed(self) -> bindings.v1Experiment:
        return bindings.v1Experiment(
            archived=False,
            config=self.config,
            id=self.id,
            jobId=f"job-{self.id}",
            name=self.config["name"],
            numTrials=len(self.trials),
            originalConfig=yaml.safe_dump(self.config),
            projectId=1,
            projectOwnerId=1,
            searcherType=self.config["searcher"]["name"],
            startTime=NOW,
            state=self.state,
            username="determined",
        )


def grid(hparams: dict) -> list[dict]:
    """The trials of a grid over categorical values; one trial without any."""
    axes = {
        key: value["vals"]
        for key, value in hparams.items()
        if isinstance(value, dict) and value.get("type") == "categorical"
    }
    choices = itertools.product(*axes.values())
    return [{**hparams, **dict(zip(axes, c, strict=True))} for c in choices]


class NotFound(Exception):
    pass


class MasterDouble:
    """A test double; `with MasterDouble(folder) as master: ... master.address`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed = threading.Condition()
        self.closed = self.held = False
        self.experiments: dict[int, Experiment] = {}
        self.trials: dict[int, Trial] = {}
        self.unanswered: list[str] = []
        self.threads: list[threading.Thread] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> MasterDouble:
        self._start(self.server.serve_forever, 0.05)
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()
        for thread in self.threads:
            while thread.is_alive():
                for trial in self.trials.values():
                    if trial.process:
                        kill_tree(trial.process)
                thread.join(timeout=0.5)

    def _start(self, target, *args) -> None:
        self.threads.append(threading.Thread(target=target, args=args, daemon=True))
        self.threads[-1].start()

    def _run_experiment(self, experiment: Experiment) -> None:
        for trial in experiment.trials:
            while trial.state == TrialState.ACTIVE:
                with self.changed:
                    self.changed.wait_for(lambda: self.closed or not experiment.paused)
                if self.closed:
                    return
                trial.runs += 1
                trial.acknowledged = False
                code = run_trial(trial, self.folder, self.address, TOKEN)
                with self.changed:
                    if code == 0 and not trial.acknowledged:
                        trial.state = TrialState.COMPLETED
                    elif code:
                        trial.state = TrialState.ERROR
                    self.changed.notify_all()
        with self.changed:
            done = all(t.state == TrialState.COMPLETED for t in experiment.trials)
            state = ExperimentState.COMPLETED if done else ExperimentState.ERROR
            experiment.state = state
            self.changed.notify_all()

    # ---- the API, each call by its path; a group of the path is an argument

    def _experiment(self, number: str) -> Experiment:
        if int(number) not in self.experiments:
            raise NotFound(f"experiment {number} not found")
        return self.experiments[int(number)]

    def post_auth_login(self, query, body):
        bindings.v1LoginRequest.from_json(body)
        return bindings.v1LoginResponse(token=TOKEN, user=USER)

    def get_me(self, query, body):
        return bindings.v1GetMeResponse(user=USER)

    def post_experiments(self, query, body):
        request = bindings.v1CreateExperimentRequest.from_json(body)
        config = yaml.safe_load(request.config)
        workspace, project = config.get("workspace"), config.get("project")
        if workspace not in WORKSPACES:
            raise NotFound(f"workspace '{workspace}' not found")
        if project not in WORKSPACES[workspace]:
            raise NotFound(f"project '{project}' not found")
        storage = {"type": "directory", "container_path": str(self.folder / "storage")}
        config = {"checkpoint_storage": storage, "checkpoint_policy": "best", **config}
        with self.changed:
            number = len(self.experiments) + 1
            experiment = Experiment(number, config, list(request.modelDefinition))
            for hparams in grid(config["hyperparameters"]):
                trial = Trial(len(self.trials) + 1, experiment, hparams)
                experiment.trials.append(trial)
                self.trials[trial.id] = trial
            self.experiments[number] = experiment
        self._start(self._run_experiment, experiment)
        return bindings.v1CreateExperimentResponse(
            config=config, experiment=experiment.typed()
        )

    def get_experiments_N(self, query, body, number):
        experiment = self._experiment(number).typed()
        return bindings.v1GetExperimentResponse(experiment=experiment)

    def get_experiments_N_trials(self, query, body, number):
        trials = [trial.typed() for trial in self._experiment(number).trials]
        page = bindings.v1Pagination(endIndex=len(trials), total=len(trials))
        return bindings.v1GetExperimentTrialsResponse(pagination=page, trials=trials)

    def _set_state(self, state: ExperimentState, query, body, number):
        with self.changed:
            self._experiment(number).state = state
            self.changed.notify_all()
        return {}

    post_experiments_N_pause = partialmethod(_set_state, ExperimentState.PAUSED)
    post_experiments_N_activate = partialmethod(_set_state, ExperimentState.ACTIVE)

    def get_experiments_N_checkpoints(self, query, body, number):
        experiment, name = self._experiment(number), query["sortByMetric"][0]
        found = []
        for trial in experiment.trials:
            validations = trial.reported("validation")
            for checkpoint in trial.checkpoints:
                values = validations.get(checkpoint.metadata["steps_completed"], {})
                if name not in values:
                    continue
                checkpoint.training = bindings.v1CheckpointTrainingMetadata(
                    experimentConfig=experiment.config,
                    experimentId=experiment.id,
                    hparams=trial.hparams,
                    trialId=trial.id,
                    validationMetrics=bindings.v1Metrics(avgMetrics=values),
                )
                found.append((values[name], checkpoint))
        assert bindings.v1OrderBy(query["orderBy"][0]) == bindings.v1OrderBy.DESC
        found.sort(key=lambda x: x[0], reverse=True)
        kept = [c for _, c in found][: int(query["limit"][0])]
        page = bindings.v1Pagination(endIndex=len(kept), total=len(kept))
        return bindings.v1GetExperimentCheckpointsResponse(
            checkpoints=kept, pagination=page
        )

    def get_experiments_N_searcher_best_searcher_validation_metric(
        self, query, body, number
    ):
        values = [
            metrics["mAP"]
            for trial in self._experiment(number).trials
            for metrics in trial.reported("validation").values()
        ]
        if not values:
            raise NotFound("no validations yet")
        return {"metric": max(values)}

    def get_trials_N(self, query, body, number):
        return bindings.v1GetTrialResponse(trial=self.trials[int(number)].typed())

    def post_trials_N_metrics(self, query, body, number):
        request = bindings.v1ReportTrialMetricsRequest.from_json(body)
        steps, values = request.metrics.stepsCompleted, request.metrics.metrics
        with self.changed:
            entry = (request.group, steps, values.avgMetrics)
            self.trials[int(number)].metrics.append(entry)
            self.changed.notify_all()
        return {}

    def post_trials_N_progress(self, query, body, number):
        self.trials[int(number)].progress = body["progress"]
        return {}

    def post_trials_N_runner_metadata(self, query, body, number):
        self.trials[int(number)].statuses.append(body["state"])
        return {}

    def post_runs_start(self, query, body):
        bindings.v1RunPrepareForReportingRequest.from_json(body)
        return bindings.v1RunPrepareForReportingResponse(storageId=1)

    def post_checkpoints(self, query, body):
        checkpoint = bindings.v1Checkpoint.from_json(body)
        trial = self.trials[int(checkpoint.taskId.removeprefix("task-"))]
        with self.changed:
            trial.checkpoints.append(checkpoint)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closed or not self.held, 120)
        return {}

    def get_allocations_A_signals_preemption(self, query, body, allocation):
        experiment = self.trials[int(allocation.partition(".")[0])].experiment
        with self.changed:
            preempt = self.changed.wait_for(
                lambda: self.closed or experiment.paused,
                int(query["timeout_seconds"][0]),
            )
        return bindings.v1AllocationPreemptionSignalResponse(preempt=preempt)

    def post_allocations_A_signals_ack_preemption(self, query, body, allocation):
        with self.changed:
            self.trials[int(allocation.partition(".")[0])].acknowledged = True
            self.changed.notify_all()
        return {}

    def hold_checkpoints(self, held: bool) -> None:
        """Answer no report of a checkpoint for now: a trial waits after its first."""
        with self.changed:
            self.held = held
            self.changed.notify_all()

    def wait_for(self, condition, timeout: float = 400) -> None:
        """Wait until `condition()`, looked at whenever a trial reports something."""
        with self.changed:
            if not self.changed.wait_for(condition, timeout):
                logs = [trial.log() for trial in self.trials.values()]
                raise TimeoutError("\n".join(logs)[-4000:])


def _handler(master: MasterDouble) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, code: int, content: dict) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data)  # a process may end while it waits

        def handle_call(self) -> None:
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or "{}")
            if url.path == "/info":
                known = {"version": det.__version__, "cluster_id": "test-double"}
                self.answer(200, {**known, "master_id": "test-double"})
                return
            path = url.path.removeprefix("/api/v1/")
            tokens = [self.headers.get(name) for name in (AUTH, TASK_AUTH)]
            if f"Bearer {TOKEN}" not in tokens and path != "auth/login":
                self.answer(401, {"message": "not logged in"})
                return
            arguments = re.findall(r"(?<=/)[0-9][0-9.]*(?=/|$)", path)
            kind = "A" if path.startswith("allocations/") else "N"
            name = re.sub(r"(?<=/)[0-9][0-9.]*(?=/|$)", kind, path).replace("/", "_")
            call = getattr(master, f"{self.command.lower()}_{name}", None)
            if call is None:
                master.unanswered.append(f"{self.command} {self.path}")
                self.answer(404, {"message": f"the test double knows no {self.path}"})
                return
            try:
                answer = call(parse_qs(url.query), body, *arguments)
            except NotFound as error:
                self.answer(404, {"message": str(error)})
                return
            if not isinstance(answer, dict):
                answer = answer.to_json(omit_unset=True)
            self.answer(200, answer)

        do_GET = do_POST = handle_call

    return Handler
