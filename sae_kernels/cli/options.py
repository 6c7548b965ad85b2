"""Options that several commands have."""

from typing import Annotated, Any

import typer

# main() looks for --debug itself, as parsing the arguments may fail; it is declared here for the
# help, and so that it may stand before or after the command.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[
    bool, typer.Option("--json", help="Write JSON to standard output, one object a line.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the contents of the output folder.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check the activations against their checksums first.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the output folder, if there is one.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Device of the model: auto (a usable GPU, else the CPU), cpu, cuda:0, ..."),
]
ModelDtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16|float16",
        help="Dtype of the model's weights and what it computes. [default: the checkpoint's]",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the model over several devices instead, as transformers does: auto, ..."
    ),
]


def placed(device: str | None, dtype: str | None, device_map: str | None) -> dict[str, Any]:
    """Arguments of ``load_model`` for these flags; the device is "auto" unless one is given."""
    return {
        "device": "auto" if device is None and device_map is None else device,
        "dtype": dtype,
        "device_map": device_map,
    }
