"""Logs say what happened, and keep secrets."""

import json

import structlog

from aggregator_server.config import LogFormat
from aggregator_server.logs import configure_logs
from protocol.wire import b64u_encode

SECRET = "hunter2"


def fail_with(invite_code: str) -> None:
    message = f"broken after {len(invite_code)} characters"
    raise RuntimeError(message)


def test_json_lines_carry_the_event_and_its_numbers(capsys):
    configure_logs(LogFormat.JSON)
    structlog.get_logger().info("round opened", round=3)
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["round"], line["level"]) == ("round opened", 3, "info")


def test_a_traceback_shows_no_local_variables(capsys):
    for log_format in LogFormat:
        configure_logs(log_format)
        try:
            fail_with(SECRET)
        except RuntimeError as error:
            structlog.get_logger().error("failed", exc_info=error)
        logged = capsys.readouterr().err
        assert "RuntimeError: broken after 7 characters" in logged
        assert SECRET not in logged


def test_requests_are_logged_only_on_demand(capsys):
    configure_logs(LogFormat.CONSOLE)
    structlog.get_logger().debug("request", route="/task")
    assert not capsys.readouterr().err
    configure_logs(LogFormat.CONSOLE, verbose=True)
    structlog.get_logger().debug("request", route="/task")
    assert "/task" in capsys.readouterr().err


def test_a_whole_round_logs_no_secret(make_case, make_agent, capsys):
    case = make_case(open_enrolment=False, cohort_target=2)
    configure_logs(LogFormat.JSON, verbose=True)
    invites = [case.federation.membership.invite() for _ in range(2)]
    agents = [make_agent(case) for _ in range(2)]
    for agent, invite in zip(agents, invites, strict=True):
        assert agent.enrol(invite).status_code == 200
    make_agent(case).enrol(None)
    case.advance()
    manifest = agents[0].round()
    for agent in agents:
        agent.upload(manifest, agent.constant(1))
    case.advance()
    logged = capsys.readouterr().err
    assert "release published" in logged
    keys = case.federation.charter.keys
    secrets = [invite.code for invite in invites]
    secrets += [keys.server.private_bytes(), keys.registrar.private_bytes()]
    for secret in secrets:
        assert b64u_encode(secret)[:20] not in logged
        assert secret.hex() not in logged


def test_a_value_cannot_write_a_line_of_its_own(capsys):
    for log_format in LogFormat:
        configure_logs(log_format)
        structlog.get_logger().info("round moved", failure="x\n2026 [info] forged\x1b[2J")
        logged = capsys.readouterr().err
        assert logged.count("\n") == 1
        assert "\x1b[2J" not in logged
