// What every client is asked to do, and how its script reports; see ../checks.py.
export const url = process.env.STEERSERVE_URL;
export const model = process.env.STEERSERVE_MODEL;
export const base = process.env.EXPECTED_BASE;
export const steered = process.env.EXPECTED_STEERED;
export const prompt = "Write one sentence about my rude neighbour.";
export const weather = "What is the weather in Paris?";
export const person = "Invent a person.";
export const tokens = 24;
export const steering = { intervention: "detox-lineas" };

export function same(found, expected) {
  if (found !== expected) {
    throw new Error(`found ${JSON.stringify(found)}, expected ${JSON.stringify(expected)}`);
  }
}

export function called(name, given) {
  if (name !== "get_weather" || typeof given?.city !== "string") {
    throw new Error(`found a call of ${name} with ${JSON.stringify(given)}`);
  }
}

// Run the checks, and print a line of JSON for each: its name, and null or its fault.
export async function run(checks) {
  for (const [name, check] of Object.entries(checks)) {
    let fault = null;
    try {
      await check();
    } catch (error) {
      console.error(error);
      fault = String(error);
    }
    console.log(JSON.stringify([name, fault]));
  }
}
