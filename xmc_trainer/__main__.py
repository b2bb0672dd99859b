from xmc_trainer.cli import main

main()
