"""`jepa-fast bench patches`: other people's code before and after its patch, one file of cases per family of code bases."""
