"""What `dgfast report` reads, draws and writes: one page of what others have measured. It measures nothing itself."""
