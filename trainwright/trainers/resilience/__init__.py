"""What keeps a long run going: hangs end and are started again, slow ranks are named."""
