from server.record import RunFolder


def write_report(folder: RunFolder) -> None:
    folder.report.write_text("")
