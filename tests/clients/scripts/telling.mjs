// What every client for Node here does: try its features, and print what came of each.

export const MODEL = "dserve-tiny";
export const BASE = process.argv[2]; // http://127.0.0.1:…, without /v1
export const FOX = "Tell me a short story about a fox.";
export const MIA = "Give me a JSON object for a person called Mia who is 31 years old.";
export const SUM = "What is 17 plus 25?";
export const WEATHER = "What is the weather in Paris?";
export const SUNNY = { temperature: 18, condition: "sunny" };
export const GET_WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
    },
  },
};

// The last line printed is JSON: of each feature its `value`, or the `error` it ended with.
export async function tell(features) {
  const told = {};
  for (const [name, ask] of Object.entries(features)) {
    try {
      told[name] = { value: await ask() };
    } catch (error) {
      told[name] = { error: `${error.stack ?? error}` };
    }
  }
  console.log("\n" + JSON.stringify(told));
}
