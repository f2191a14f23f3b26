from commands import run_here


def test_report_of_what_is_no_report(tmp_path):
    done = run_here(["mpicoll", "report", "nowhere"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err == "mpicoll: 'nowhere' holds no report: expected files rank-0.json, rank-1.json, ...\n"
