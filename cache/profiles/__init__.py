"""What is kept of the teacher's distribution at each position; docs/format.md, section 4. One profile, one file."""
