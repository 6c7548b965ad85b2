"""Options that several commands have."""

from typing import Annotated

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
