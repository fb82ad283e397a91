"""Other tools beside hessdiag."""
