"""`smalti doctor`: what of this machine, cluster and run would stop a training, said before one is started."""
