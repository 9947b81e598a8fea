"""A command that sends itself a signal in a phase: `python kill_at.py SIGNAL MODULE FUNCTION COMMAND FLAGS`.

With FUNCTION `-` the phase is the import of MODULE, else the first call of that function; FUNCTION+SECONDS is so long
after the call began, wherever the process is by then.
"""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

number, module, function, command, *flags = sys.argv[1:]
function, _, later = function.partition("+")


def send() -> None:
    os.kill(os.getpid(), getattr(signal, number))


class AtImport:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == module:
            send()


def at_call(frame, event, argument):
    if event == "call" and frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
        sys.setprofile(None)
        threading.Timer(float(later), send).start() if later else send()


script = Path(__file__).parent.parent / "experiments" / f"{command}.py"
sys.path[0] = str(script.parent)
sys.argv = [str(script), *flags]
if function == "-":
    sys.meta_path.insert(0, AtImport())  # pyright: ignore[reportArgumentType]
else:
    sys.setprofile(at_call)
runpy.run_path(str(script), run_name="__main__")
