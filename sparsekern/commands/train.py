"""python -m sparsekern train"""

from ..gpt import distributed
from ..gpt.config import config_from, resumed_config
from ..gpt.heartbeat import stop
from ..gpt.train import train
from ..report import demo as demo_report
from . import algorithms


def run_train(**given) -> None:
    if "help_algorithm" in given:
        print(algorithms.help_of(given["help_algorithm"]))
        return
    try:
        config = resumed_config(given) if given.get("resume") else config_from(given)
        config.check_use(given)  # a flag at its default as well
        result = train(config)
    except RuntimeError as error:
        if text := distributed.lost(error):
            stop(text)  # threads of the group may abort where the interpreter ends
        raise
    finally:
        distributed.finish()
    if result["sparsity"] and distributed.is_first_rank():
        print(f"wafer  {demo_report.wafer_line(result)}")
