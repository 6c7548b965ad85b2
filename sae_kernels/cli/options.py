"""Options that several commands have."""

from typing import Annotated

import typer

# main() looks for --debug itself, since reading the arguments may be what fails; declared here,
# it shows in the help and may stand on either side of the command.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[
    bool, typer.Option("--json", help="Write JSON to standard output, one object a line.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare the data's checksums first.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what the folder holds, if it holds a run.")
]
